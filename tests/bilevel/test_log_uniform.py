"""Runs of log-uniform length: the stated distribution, and what it is unbiased for."""

import math
from collections import Counter

import problems
import pytest
from goodness_of_fit import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import brute_force, relative_error, seeded

import bilevel
from bilevel.truncation import LogUniform, Plan, RandomWindow

seeds = st.integers(0, 2**31)


@st.composite
def shapes(draw):
    """(minimum, window or None, steps) with 1 ≤ window ≤ minimum ≤ steps."""
    steps = draw(st.integers(1, 200))
    minimum = draw(st.integers(1, steps))
    return minimum, draw(st.none() | st.integers(1, minimum)), steps


def stated(minimum, steps):
    """P(N = n)."""
    total = math.log((steps + 1) / minimum)
    return {n: math.log((n + 1) / n) / total for n in range(minimum, steps + 1)}


def lengths(schedule, steps, count, seed):
    generator = seeded(seed)
    return Counter(schedule.plan(steps, generator).window.stop for _ in range(count))


@given(shapes(), seeds)
def test_windows_end_with_the_run_and_are_as_wide_as_asked(shape, seed):
    minimum, window, steps = shape
    schedule, generator = LogUniform(minimum, window), seeded(seed)
    assert schedule.minimum_steps == minimum
    for _ in range(9):
        plan = schedule.plan(steps, generator)
        assert plan == Plan.of(plan.window)
        assert minimum <= plan.window.stop <= steps
        assert plan.window.width == (plan.window.stop if window is None else window)


@settings(max_examples=20)
@given(shapes(), seeds)
def test_lengths_are_drawn_as_stated(shape, seed):
    minimum, window, steps = shape
    counts = lengths(LogUniform(minimum, window), steps, 2000, seed)
    assert p_value(counts, stated(minimum, steps), 2000) > 1e-6


def test_the_test_of_fit_rejects_uniform_lengths_and_other_bounds():
    """Its power: uniform lengths, and the released code's, which never reach T."""
    uniform = lengths(RandomWindow(5), 40, 3000, 0)
    assert p_value(uniform, stated(5, 40), 3000) < 1e-12
    right = lengths(LogUniform(5), 40, 3000, 0)
    assert p_value(right, stated(5, 40), 3000) > 1e-4
    assert p_value(right, stated(5, 39), 3000) == 0
    assert p_value(right, stated(4, 40), 3000) < 1e-12


@given(st.integers(1, 8), st.integers(0, 4))
def test_every_order_of_magnitude_is_as_likely_as_the_next(minimum, doublings):
    chances = stated(minimum, minimum * 2 ** (doublings + 1) - 1)
    orders = [
        sum(chances[n] for n in range(minimum * 2**k, minimum * 2 ** (k + 1)))
        for k in range(doublings + 1)
    ]
    assert orders == pytest.approx([1 / (doublings + 1)] * (doublings + 1))


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(3, 8), st.integers(0, 999))
def test_every_draw_is_exact_for_the_run_of_its_length(minimum, steps, seed):
    """So their mean is, with the chances above, for the outer loss averaged over lengths."""
    case, optimizer = problems.make("quadratic", seed), bilevel.optim.sgd(0.1)
    solve = bilevel.Hypergradient(case.problem, optimizer, steps, LogUniform(minimum))
    for draw in range(seed, seed + 6):
        result = solve(case.outer, case.outer_batch, seeded(draw))
        assert result.window == bilevel.Window(0, result.trace.horizon)
        key = bilevel.Key.draw(seeded(draw))
        loss, grads = brute_force(case, optimizer, key, result.window)
        assert relative_error(result.loss, loss) < 1e-10
        assert relative_error(result.grads, grads) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": 0}, "minimum=0: .* at least 1"),
        ({"minimum": 2.5}, "minimum=2.5: .* integer"),
        ({"minimum": 5, "window": 6}, r"window=6: .* in \[1, 5\]"),
        ({"minimum": 5, "window": 0}, r"window=0: .* in \[1, 5\]"),
        ({"minimum": 5, "window": True}, "window=True"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(bilevel.ConfigurationError, match=message):
        LogUniform(**options)
