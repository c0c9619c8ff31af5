"""First-order MAML is the adjoint without the Hessian; Reptile is φ − θ_T, and nothing else."""

from functools import partial

import problems
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import DTYPE, Fixed, flat, randn, relative_error, seeded

import bilevel
from bilevel import ConfigurationError, ProblemError
from bilevel.estimators import Adjoint, FirstOrder, Reptile

seeds = st.integers(0, 2**31)
OPTIMIZERS = {
    "sgd": bilevel.optim.sgd,
    "momentum": partial(bilevel.optim.sgd, momentum=0.8, nesterov=True),
    "adam": partial(bilevel.optim.adam, eps_root=1e-4),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def solve(case, optimizer, steps, estimator, truncation=None, seed=0, **settings):
    hypergradient = bilevel.Hypergradient(
        case.problem, optimizer, steps, truncation, estimator, **settings
    )
    return hypergradient(case.outer, case.outer_batch, seeded(seed))


def without_curvature(case):
    """The same problem with ⟨∇ℓ at a fixed point, θ⟩ for ℓ: φ as before, no Hessian."""
    problem = case.problem
    loss = type(problem).inner_loss

    def linear(params, batch):
        point = {name: torch.full_like(leaf, 0.3) for name, leaf in params.items()}
        slopes = torch.func.grad(lambda at: loss(problem, at, batch))(point)
        return sum((slopes[name] * leaf).sum() for name, leaf in params.items())

    problem.inner_loss = linear
    return case


# First-order MAML.


@every_optimizer
@settings(max_examples=6)
@given(st.sampled_from(["quadratic", "data_cleaning", "learned_start"]), st.integers(0, 4), seeds)
def test_it_is_exact_where_the_inner_loss_is_linear(make, name, start, seed):
    case = without_curvature(problems.make(name, seed % 1000))
    window = bilevel.Window(start, 5)
    _, expected = problems.brute_force(case, make(0.05), bilevel.Key.draw(seeded(seed)), window)
    result = solve(case, make(0.05), 5, FirstOrder(), Fixed(start, 5), seed)
    assert relative_error(result.grads, expected) < 1e-8


@every_optimizer
@settings(max_examples=6)
@given(st.sampled_from(list(problems.PROBLEMS)), seeds)
def test_one_step_that_is_not_the_first_has_no_hessian_to_leave_out(make, name, seed):
    case = problems.make(name, seed % 1000)
    optimizer = case.optimizer(make, 0.05)
    window = bilevel.Window(3, 4)
    _, expected = problems.brute_force(case, optimizer, bilevel.Key.draw(seeded(seed)), window)
    result = solve(case, optimizer, 4, FirstOrder(), bilevel.truncation.Last(1), seed)
    assert relative_error(result.grads, expected) < 1e-8


@settings(max_examples=6)
@given(st.floats(0.01, 0.2), st.integers(1, 6), seeds)
def test_a_learned_start_under_sgd_gets_the_outer_gradient_at_the_end(rate, steps, seed):
    """As first-order MAML is written: ∂F/∂θ_T, handed on to the initialisation."""
    case = problems.make("learned_start", seed % 1000)
    result = solve(case, bilevel.optim.sgd(rate), steps, FirstOrder(), seed=seed)
    params = {name: leaf.clone().requires_grad_() for name, leaf in result.params.items()}
    loss = case.problem.outer_loss(params, case.outer, case.outer_batch)
    scale, shift = torch.autograd.grad(loss, [params["scale"], params["shift"]])
    assert relative_error(result.grads, {"scale": scale, "shift": 1.5 * shift}) < 1e-12
    assert result.stats.hessian_vector_products == 0


@settings(max_examples=6)
@given(st.integers(1, 5), st.floats(0.01, 0.3), seeds)
def test_the_error_is_at_most_what_the_curvature_allows(steps, rate, seed):
    """‖Π(I − αA) − I‖ ≤ (1 + αL)^T − 1, and of first order in α."""
    case = problems.make("quadratic", seed % 1000)
    problem, A = case.problem, case.problem.A
    problem.init = lambda outer, *, generator: {"theta": outer["theta"]}
    outer = case.outer | {"theta": problem.start}
    case = problems.Case(problem, outer, case.outer_batch)
    largest = float(torch.linalg.eigvalsh(A)[-1])

    def error(rate):
        exact, found = (
            solve(case, bilevel.optim.sgd(rate), steps, estimator).grads["theta"]
            for estimator in [Adjoint(), FirstOrder()]
        )
        return float((found - exact).norm() / found.norm())

    assert error(rate) <= ((1 + rate * largest) ** steps - 1) * (1 + 1e-9)
    assume(error(1e-3) > 1e-9)
    assert 1.9 < error(2e-3) / error(1e-3) < 2.1


def test_hyperparameters_and_losses_along_the_run_are_differentiated():
    case = without_curvature(problems.make("learned_rate", 1))

    def along(params, outer, step, *, generator):
        return (params["scale"] ** 3).sum() * step

    case.problem.step_loss = along
    window = bilevel.Window(0, 4)
    loss, expected = problems.brute_force(
        case, bilevel.optim.sgd, bilevel.Key.draw(seeded(0)), window
    )
    result = solve(case, bilevel.optim.sgd, 4, FirstOrder())
    assert relative_error(result.loss, loss) < 1e-12
    assert relative_error(result.grads, expected) < 1e-10


def test_iterates_that_were_not_kept_change_nothing():
    case = problems.make("data_cleaning", 0)
    run = partial(solve, case, OPTIMIZERS["adam"](0.05), 6, FirstOrder(), Fixed(1, 6))
    assert torch.equal(flat(run().grads), flat(run(keep_every=4, keep_on="cpu").grads))


# Reptile.


@every_optimizer
@settings(max_examples=5)
@given(st.integers(1, 6), seeds)
def test_one_outer_step_at_rate_one_goes_to_the_end_of_the_run(make, steps, seed):
    case = problems.make("learned_start", seed % 1000)
    case.problem.init = lambda outer, *, generator: outer
    result = solve(case, make(0.05), steps, Reptile(), seed=seed)
    for name, start in case.outer.items():
        assert torch.allclose(start - result.grads[name], result.params[name], atol=1e-14)
    loss = case.problem.outer_loss(result.params, case.outer, case.outer_batch)
    assert torch.allclose(result.loss, loss, rtol=1e-12)


@settings(max_examples=5)
@given(seeds)
def test_it_comes_to_rest_at_the_mean_of_the_optima(seed):
    """Every run goes the same part of the way to its optimum, so the weights are equal."""
    optima = randn(4, 3, generator=seeded(seed))
    start = torch.zeros(3, dtype=DTYPE)
    task = {"index": 0}
    problem = bilevel.Problem.from_functions(
        init=lambda outer: outer,
        inner_batch=lambda outer, step: optima[task["index"]],
        inner_loss=lambda params, batch: 0.5 * ((params - batch) ** 2).sum(),
        outer_loss=lambda params, outer, batch: (params**2).sum(),
    )
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.5), 5, estimator=Reptile())
    for _ in range(60):
        grads = []
        for task["index"] in range(4):
            grads.append(hypergradient(start).grads)
        start = start - torch.stack(grads).mean(0)
    assert relative_error(start, optima.mean(0)) < 1e-10


class Both(problems.LearnedStart):
    def inner_batch(self, outer, step, *, generator):
        return self.inputs + outer["shift"], self.targets


def test_whatever_is_no_initialisation_is_refused_by_name():
    data = problems.make("data_cleaning", 0)
    with pytest.raises(ProblemError, match=r"\['0'\] do not reach the initialisation"):
        solve(data, bilevel.optim.sgd(0.1), 3, Reptile())
    rate = problems.make("learned_rate", 0)
    with pytest.raises(ProblemError, match=r"\['log_lr'\] do not reach the initialisation"):
        solve(rate, bilevel.optim.sgd, 3, Reptile())
    start = problems.make("learned_start", 0)
    both = problems.Case(
        Both(start.problem.inputs, start.problem.targets), start.outer, start.outer_batch
    )
    with pytest.raises(ProblemError, match=r"\['shift'\] reach the batch"):
        solve(both, bilevel.optim.sgd(0.1), 3, Reptile())
    rate.problem.init = lambda outer, *, generator: {
        "scale": outer["scale"] + outer["log_lr"],
        "shift": outer["shift"],
    }
    with pytest.raises(ProblemError, match=r"\['log_lr'\] reach the hyperparameters"):
        solve(rate, bilevel.optim.sgd, 3, Reptile())


@pytest.mark.parametrize("window", [(1, 3), (0, 2)])
def test_a_part_of_the_run_is_refused(window):
    case = problems.make("learned_start", 0)
    with pytest.raises(ConfigurationError, match=r"truncation must be Full\(\)"):
        solve(case, bilevel.optim.sgd(0.1), 3, Reptile(), Fixed(*window))


def test_losses_along_the_run_are_refused():
    case = problems.make("learned_start", 0)
    case.problem.step_loss = lambda params, outer, step, *, generator: params["shift"].sum()
    with pytest.raises(ConfigurationError, match="estimator=Reptile: it differentiates where"):
        solve(case, bilevel.optim.sgd(0.1), 3, Reptile())
