"""Finite differences: close to the exact adjoint for smooth losses, by first derivatives alone."""

import problems
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import DTYPE, Fixed, flat, relative_error, seeded

import bilevel
from bilevel import ConfigurationError
from bilevel.estimators import Adjoint, FiniteDifference

seeds = st.integers(0, 2**31)
OPTIMIZERS = {
    "sgd": lambda lr: bilevel.optim.sgd(lr),
    "momentum": lambda lr: bilevel.optim.sgd(lr, momentum=0.8, nesterov=True),
    "adam": lambda lr: bilevel.optim.adam(lr, eps_root=1e-4),
}


def solve(case, optimizer, steps, estimator, truncation=None, seed=0):
    hypergradient = bilevel.Hypergradient(
        case.problem, optimizer, steps, truncation, estimator, graph_budget=0
    )
    return hypergradient(case.outer, case.outer_batch, seeded(seed))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@settings(max_examples=8)
@given(st.sampled_from(list(problems.PROBLEMS)), st.integers(0, 4), seeds)
def test_it_is_the_adjoint_up_to_the_square_of_the_radius(make, name, start, seed):
    case = problems.make(name, seed % 1000)
    optimizer = case.optimizer(make, 0.05)
    exact, near, far = (
        solve(case, optimizer, 5, estimator, Fixed(start, 5), seed)
        for estimator in [Adjoint(), FiniteDifference(1e-4), FiniteDifference(1e-2)]
    )
    for result, bound in ((near, 1e-5), (far, 1e-1)):
        assert relative_error(result.grads, exact.grads) < bound
        assert relative_error(result.stats.cotangent_norms, exact.stats.cotangent_norms) < bound
    assert near.stats.status == exact.stats.status
    assert near.stats.hessian_vector_products == 0


@settings(max_examples=10)
@given(seeds)
def test_the_error_falls_with_the_square_of_the_radius(seed):
    case = problems.make("learned_start", seed % 1000)
    exact = solve(case, bilevel.optim.sgd(0.1), 3, Adjoint()).grads

    def error(radius):
        grads = solve(case, bilevel.optim.sgd(0.1), 3, FiniteDifference(radius)).grads
        return float((flat(grads) - flat(exact)).norm())

    # Where the third derivatives cancel, what is left is of a higher order.
    assume(error(1e-2) > 1e-8)
    assert 3.5 < error(2e-2) / error(1e-2) < 4.5


@given(st.floats(1e-3, 1), seeds)
def test_a_quadratic_leaves_no_error_at_any_radius(radius, seed):
    case = problems.make("quadratic", seed % 1000)
    exact, found = (
        solve(case, bilevel.optim.sgd(0.1), 4, estimator)
        for estimator in [Adjoint(), FiniteDifference(radius)]
    )
    assert relative_error(found.grads, exact.grads) < 1e-9


@given(st.floats(0.01, 0.5), seeds)
def test_the_last_step_alone_is_the_one_step_approximation(rate, seed):
    """∂F/∂φ − rate·[∇_φ ℓ(θ⁺) − ∇_φ ℓ(θ⁻)]/2ε with ε = radius/‖∂F/∂θ‖, as DARTS writes it."""
    case = problems.make("mlp_distillation", seed % 1000)
    radius = 1e-2
    result = solve(
        case,
        bilevel.optim.sgd(rate),
        4,
        FiniteDifference(radius),
        bilevel.truncation.Last(1),
        seed,
    )
    key = bilevel.Key.draw(seeded(seed))
    before = bilevel.InnerLoop(case.problem, bilevel.optim.sgd(rate))
    trajectory = bilevel.record(before, case.outer, key, steps=4)
    theta, end = (trajectory.kept[step].params for step in (3, 4))
    end = end.clone().requires_grad_()
    (slope,) = torch.autograd.grad(before.outer_loss(end, case.outer, case.outer_batch)[0], end)
    distance = radius / slope.norm()
    outer = {name: leaf.clone().requires_grad_() for name, leaf in case.outer.items()}
    above, below = (
        torch.autograd.grad(
            before.loss(theta + sign * distance * slope, before.inputs(outer, 3, key).batch),
            list(outer.values()),
        )
        for sign in (1, -1)
    )
    expected = [-rate * (a - b) / (2 * distance) for a, b in zip(above, below, strict=True)]
    assert relative_error(result.grads, expected) < 1e-7


def test_an_inner_loss_without_a_second_derivative():
    case, plain = problems.make("quadratic", 0), problems.make("quadratic", 0)
    plain.problem.inner_loss = lambda params, batch: ((params["theta"] - batch) ** 2).sum()
    case.problem.inner_loss = lambda params, batch: problems.OnceDifferentiable.apply(
        params["theta"] - batch
    ).sum()
    optimizer = bilevel.optim.sgd(0.1, momentum=0.5)
    exact = solve(plain, optimizer, 5, Adjoint())
    found = solve(case, optimizer, 5, FiniteDifference())
    assert relative_error(found.grads, exact.grads) < 1e-9
    direct = {"phi": case.problem.penalty * case.outer["phi"]}
    assert relative_error(found.grads, direct) > 0.1


def test_a_cotangent_of_zero_gives_zero_products():
    """The outer loss is flat in θ, so there is no direction to difference along."""
    case = problems.make("quadratic", 0)
    case.problem.outer_loss = lambda params, outer, batch: (
        0 * params["theta"].sum() + (outer["phi"] ** 2).sum()
    )
    result = solve(case, bilevel.optim.sgd(0.1), 3, FiniteDifference())
    assert relative_error(result.grads, {"phi": 2 * case.outer["phi"]}) < 1e-12


@pytest.mark.parametrize("radius", [0, -1.0, float("nan"), float("inf"), True, "small"])
def test_a_radius_that_cannot_work(radius):
    with pytest.raises(ConfigurationError, match=f"radius={radius!r}: .* above 0"):
        FiniteDifference(radius)


def test_hyperparameters_are_differentiated_exactly():
    case = problems.make("learned_rate", 3)
    exact, found = (
        solve(case, bilevel.optim.sgd, 4, estimator)
        for estimator in [Adjoint(), FiniteDifference(1e-4)]
    )
    assert relative_error(found.grads["log_lr"], exact.grads["log_lr"]) < 1e-6
    assert exact.grads["log_lr"].dtype == DTYPE
