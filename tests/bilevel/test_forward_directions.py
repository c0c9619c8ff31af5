"""Forward mode along random directions: unbiased, with the variance that is stated."""

import math

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Fixed, flat, relative_error, seeded

import bilevel
from bilevel import ConfigurationError
from bilevel.estimators import Adjoint, Forward

seeds = st.integers(0, 2**31)
SGD = bilevel.optim.sgd(0.1, momentum=0.5)


def solve(case, estimator, truncation=None, seed=0, steps=3, optimizer=SGD):
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, steps, truncation, estimator)
    return hypergradient(case.outer, case.outer_batch, seeded(seed))


def through_the_run(case, **settings):
    """g = dF/dφ − ∂F/∂φ, exactly, and ∂F/∂φ."""
    direct = case.problem.penalty * case.outer["phi"]
    return solve(case, Adjoint(), **settings).grads["phi"] - direct, direct


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 2)])
def test_random_directions_are_unbiased(start, stop):
    """Each coordinate of a sample has the variance ‖g‖² − g_i², and the mean of 300 is close to
    normal: |z| > 4 for one of three has a probability of 2e-4."""
    case, count = problems.make("quadratic", 0), 300
    exact, direct = through_the_run(case, truncation=Fixed(start, stop))
    result = solve(case, Forward(count), Fixed(start, stop))
    error = ((exact @ exact - exact**2) / count).sqrt()
    z = (result.grads["phi"] - direct - exact) / error
    assert float(z.abs().max()) < 4
    # The same test sees a gradient of twice the size.
    assert float(((result.grads["phi"] - direct - 2 * exact) / error).abs().max()) > 6
    # √((m − 1)/k)·‖g‖, of which the estimate from 300 samples is well within a tenth.
    expected = math.sqrt(2 / count) * float(exact.norm())
    assert 0.9 * expected < float(result.stats.standard_error) < 1.1 * expected


@settings(max_examples=6)
@given(seeds)
def test_one_direction_of_two_variables_has_two_possible_results(seed):
    """With v = (1, ±1), ⟨g, v⟩v = g ± the same with its entries exchanged."""
    case = problems.make("quadratic", seed % 1000)
    case.problem.B, case.outer = case.problem.B[:, :2], {"phi": case.outer["phi"][:2]}
    exact, direct = through_the_run(case, seed=seed)
    found = solve(case, Forward(1), seed=seed).grads["phi"] - direct
    distances = [float((found - exact - sign * exact.flip(0)).norm()) for sign in (1, -1)]
    assert min(distances) < 1e-12 * float(exact.norm())


@settings(max_examples=5)
@given(st.integers(1, 3), seeds)
def test_one_scalar_is_exact_at_any_number_of_directions(count, seed):
    case = problems.make("ridge", seed % 1000)
    exact, found = (solve(case, estimator, seed=seed) for estimator in (Adjoint(), Forward(count)))
    assert relative_error(found.grads, exact.grads) < 1e-10


def test_losses_along_the_run_and_hyperparameters_have_their_part():
    """As far from the exact gradient as the variance allows, and no farther."""
    case = problems.make("learned_rate", 0)
    case.problem.step_loss = lambda params, outer, step, *, generator: (params["scale"] ** 2).sum()
    exact, found = (
        solve(case, estimator, optimizer=bilevel.optim.sgd)
        for estimator in (Forward(), Forward(200))
    )
    assert relative_error(found.loss, exact.loss) < 1e-12
    # m − 1 = 5 of variance; four standard deviations of the mean.
    assert relative_error(found.grads, exact.grads) < 4 * math.sqrt(5 / 200)


def test_a_seed_repeats_and_another_one_differs():
    case = problems.make("data_cleaning", 0)
    first, again, other = (flat(solve(case, Forward(2), seed=s).grads) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert solve(case, Forward(1)).stats.standard_error is None


def test_a_number_of_directions_that_cannot_work():
    for wrong in (0, 1.5, True, "all"):
        with pytest.raises(ConfigurationError, match=f"directions={wrong!r}: it must be an int"):
            Forward(wrong)
    assert Forward().leaves_out == ""
    assert "2 random directions" in Forward(2).leaves_out
