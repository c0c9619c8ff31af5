"""Penalties on the inner optimality gap: the implicit hypergradient up to O(1/λ), by first
derivatives alone."""

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, Fixed, flat, randn, relative_error, seeded

import bilevel
from bilevel import ConfigurationError, MicroBatches
from bilevel.estimators import Adjoint, MoreauEnvelope, Penalty, ValueFunction

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 4)


def solve(case, optimizer, steps, estimator, truncation=None, seed=0, outer_batch=None):
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, steps, truncation, estimator)
    batch = case.outer_batch if outer_batch is None else outer_batch
    return hypergradient(case.outer, batch, seeded(seed))


#: A rate that is stable on curvatures of up to 3 + 1, and steps that converge where the least is 1.
RATE, ENOUGH = 1 / 4, 120


def quadratic(seed, size):
    """Strongly convex, with curvatures in [1, 3]."""
    case = problems.make("quadratic", seed % 1000, size)
    values = 1 + 2 * torch.rand(size, dtype=DTYPE, generator=seeded(seed))
    basis = torch.linalg.qr(randn(size, size, generator=seeded(seed)))[0]
    case.problem.A = basis @ torch.diag(values) @ basis.T
    return case


def on_the_quadratic(estimator, seed, size):
    """(the result of an estimator, the exact hypergradient, A, θ* − c, the case)."""
    case = quadratic(seed, size)
    expected, A = problems.implicit_quadratic(case)
    result = solve(case, bilevel.optim.sgd(RATE), ENOUGH, estimator)
    slope = torch.linalg.solve(A, case.problem.B @ case.outer["phi"]) - case.outer_batch
    return result, expected, A, slope, case


@settings(max_examples=3)
@given(st.floats(1, 1e6), sizes, seeds)
def test_a_penalty_is_a_damping_by_its_inverse(penalty, size, seed):
    """F has curvature I, so what it gives is ρφ + Bᵀ(A + I/λ)⁻¹(θ* − c)."""
    result, _, A, slope, case = on_the_quadratic(Penalty(penalty, ENOUGH), seed, size)
    x = torch.linalg.solve(A + torch.eye(size, dtype=DTYPE) / penalty, slope)
    problem = case.problem
    expected = problem.B.T @ x + problem.penalty * case.outer["phi"]
    assert relative_error(result.grads, expected) < 1e-8
    assert result.stats.penalty == penalty
    assert (result.stats.status, result.stats.hessian_vector_products) == ("ok", 0)


@settings(max_examples=3)
@given(st.floats(1, 1e6), st.floats(1, 100), sizes, seeds)
def test_a_moreau_envelope_is_a_penalty_with_another_hessian(penalty, gamma, size, seed):
    """γA²(I + γA)⁻¹ for A in θ, and A again in what the difference is taken of."""
    result, _, A, slope, case = on_the_quadratic(
        MoreauEnvelope(penalty, gamma, 4 * ENOUGH), seed, size
    )
    eye = torch.eye(size, dtype=DTYPE)
    part = torch.linalg.solve(eye + gamma * A, gamma * A)
    x = part @ torch.linalg.solve(A @ part + eye / penalty, slope)
    problem = case.problem
    expected = problem.B.T @ x + problem.penalty * case.outer["phi"]
    assert relative_error(result.grads, expected) < 1e-6
    assert result.stats.status == "ok"


@pytest.mark.parametrize("make", [Penalty, lambda penalty, k: MoreauEnvelope(penalty, 10.0, 2 * k)])
@settings(max_examples=3)
@given(sizes, seeds)
def test_the_bias_falls_in_proportion_to_the_penalty(make, size, seed):
    errors = []
    for penalty in (1e4, 1e5):
        result, expected, *_ = on_the_quadratic(make(penalty, ENOUGH), seed, size)
        errors.append(float((flat(result.grads) - expected).norm()))
    assert errors[0] < 1e-2 * float(expected.norm())
    assert 9.9 < errors[0] / errors[1] < 10.1


@pytest.mark.slow
@settings(max_examples=5)
@given(st.floats(0.5, 4), sizes, seeds)
def test_the_penalty_that_bome_finds_grows_with_the_steps_and_the_bias_falls_with_it(
    barrier, size, seed
):
    penalties, errors = [], []
    for steps in (200, 800):
        result, expected, *_ = on_the_quadratic(ValueFunction(barrier, steps), seed, size)
        penalties.append(result.stats.penalty)
        errors.append(float((flat(result.grads) - expected).norm()))
    assert errors[0] < 0.1 * float(expected.norm()) + 1e-3
    assert 3.3 < penalties[1] / penalties[0] < 4.2
    assert errors[1] / errors[0] < 1.3 * penalties[0] / penalties[1]


@pytest.mark.parametrize("steps", [1, 5])
@settings(max_examples=3)
@given(sizes, seeds)
def test_what_the_run_still_has_to_go_is_no_error_of_a_penalty(steps, size, seed):
    """Both further runs go it: on a quadratic the difference is that of a converged run."""
    case, optimizer = quadratic(seed, size), bilevel.optim.sgd(RATE)
    short, long = (solve(case, optimizer, n, Penalty(1e4, ENOUGH)) for n in (steps, ENOUGH))
    assert relative_error(short.grads, long.grads) < 1e-6


@settings(max_examples=3)
@given(st.floats(0.1, 1), sizes, seeds)
def test_weight_decay_in_the_optimizer_is_part_of_the_inner_loss(decay, size, seed):
    case, eye = quadratic(seed, size), torch.eye(size, dtype=DTYPE)
    A, B, phi = case.problem.A + decay * eye, case.problem.B, case.outer["phi"]
    optimizer = bilevel.optim.sgd(1 / 5, weight_decay=decay)
    result = solve(case, optimizer, ENOUGH, Penalty(1e4, ENOUGH))
    slope = torch.linalg.solve(A, B @ phi) - case.outer_batch
    expected = B.T @ torch.linalg.solve(A + eye / 1e4, slope) + case.problem.penalty * phi
    assert relative_error(result.grads, expected) < 1e-8


def cleaning(seed):
    """Logistic regression with weights, converged: neither loss is quadratic."""
    case = problems.make("data_cleaning", seed)
    case.problem.size = 8
    loss = type(case.problem).inner_loss
    case.problem.inner_loss = lambda params, batch: (
        loss(case.problem, params, batch) + 0.3 * (params["weight"] ** 2).sum()
    )
    return case


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize(
    ("estimator", "bound"),
    [
        (Penalty(1e4, 200), 1e-3),
        (Penalty(1e4, 200, batches=3), 1e-3),
        (MoreauEnvelope(1e4, 10.0, 400), 1e-3),
        (ValueFunction(2.0, 1000), 2e-2),
    ],
    ids=["penalty", "batches", "moreau", "value_function"],
)
def test_they_agree_with_the_unrolled_run_where_that_converges(estimator, bound, momentum):
    case, optimizer = cleaning(0), bilevel.optim.sgd(0.5, momentum)
    exact = solve(case, optimizer, 150, Adjoint())
    found = solve(case, optimizer, 150, estimator)
    assert relative_error(found.grads, exact.grads) < bound
    assert relative_error(found.loss, exact.loss) < 1e-12
    assert torch.equal(flat(found.params), flat(exact.params))
    assert found.metrics.keys() == exact.metrics.keys()
    assert found.stats.status == "ok"


ALL = [Penalty(1e3, 150), MoreauEnvelope(1e3, 10.0, 150), ValueFunction(1.0, 150)]
every_method = pytest.mark.parametrize("estimator", ALL, ids=lambda each: type(each).__name__)


@every_method
def test_no_second_derivative_is_taken(estimator):
    plain, case = problems.make("quadratic", 0), problems.make("quadratic", 0)
    plain.problem.inner_loss = lambda params, batch: ((params["theta"] - batch) ** 2).sum()
    case.problem.inner_loss = lambda params, batch: problems.OnceDifferentiable.apply(
        params["theta"] - batch
    ).sum()
    optimizer = bilevel.optim.sgd(0.1)
    exact, found = (
        solve(plain, optimizer, 150, Adjoint()),
        solve(case, optimizer, 150, estimator),
    )
    assert relative_error(found.grads, exact.grads) < 0.05


@every_method
def test_micro_batches_are_one_batch(estimator):
    case, optimizer = cleaning(1), bilevel.optim.sgd(0.5)
    inputs, labels = case.outer_batch
    pieces = MicroBatches([(inputs[:2], labels[:2]), (inputs[2:], labels[2:])], [2 / 6, 4 / 6])
    whole, parts = (
        solve(case, optimizer, 20, estimator, outer_batch=batch)
        for batch in (case.outer_batch, pieces)
    )
    assert relative_error(parts.grads, whole.grads) < 1e-6


@every_method
def test_where_the_window_starts_does_not_matter(estimator):
    case, optimizer = problems.make("data_cleaning", 0), bilevel.optim.sgd(0.3)
    whole, part = (solve(case, optimizer, 6, estimator, Fixed(s, 6)) for s in (0, 4))
    assert torch.equal(flat(whole.grads), flat(part.grads))


@every_method
def test_a_start_and_a_rate_have_no_effect_on_an_optimum_and_the_status_says_so(estimator):
    case = problems.make("learned_rate", 0)
    result = solve(case, bilevel.optim.sgd, 5, estimator)
    assert not flat(result.grads).any()
    assert "['log_lr', 'scale', 'shift'] is exactly zero" in result.stats.status


def test_a_further_run_that_is_not_at_rest_is_named():
    case = problems.make("quadratic", 0)
    result = solve(case, bilevel.optim.sgd(0.01), 200, Penalty(100.0, 3))
    assert "not at rest: a relative residual of" in result.stats.status
    assert "after 3 steps" in result.stats.status
    assert result.stats.solver.residual > 0.1
    assert result.stats.solver.iterations == 3


def test_an_outer_loss_that_is_flat_gives_its_direct_part_alone():
    case = problems.make("quadratic", 0)
    case.problem.outer_loss = lambda params, outer, batch: (
        (params["theta"] ** 2).sum() * 0 + (outer["phi"] ** 3).sum()
    )
    for estimator in ALL:
        result = solve(case, bilevel.optim.sgd(0.3), 100, estimator)
        expected = {"phi": 3 * case.outer["phi"] ** 2}
        # The penalty of 1e3 multiplies rounding.
        assert relative_error(result.grads, expected) < 1e3 * 1e-14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Penalty(0), "penalty=0: it must be a finite number above 0"),
        (lambda: Penalty(steps=0), "steps=0: it must be an integer of at least 1"),
        (lambda: Penalty(batches=0), "batches=0"),
        (lambda: MoreauEnvelope(-1.0), "penalty=-1.0"),
        (lambda: MoreauEnvelope(gamma=0), "gamma=0: it must be a finite number above 0"),
        (lambda: MoreauEnvelope(steps=0.5), "steps=0.5"),
        (lambda: ValueFunction(float("nan")), "barrier=nan: it must be a finite number above 0"),
        (lambda: ValueFunction(steps=True), "steps=True"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_more_batches_than_steps():
    case = problems.make("quadratic", 0)
    for make in (Penalty, MoreauEnvelope, ValueFunction):
        with pytest.raises(ConfigurationError, match="batches=4: there are only 3 inner steps"):
            solve(case, bilevel.optim.sgd(0.1), 3, make(batches=4))
