"""Distributions over inner steps: the stated formula, what they do not depend on, their spread."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPE, seeded

import bilevel
from bilevel.truncation import EffectiveSteps, Softmax

seeds = st.integers(0, 2**31)
signs = st.sampled_from([1, -1])
temperatures = st.floats(0.2, 5)


@st.composite
def profiles(draw, least=2):
    """(g > 0 falling by some decades with noise, the steps that may be chosen)."""
    steps = draw(st.integers(least, 40))
    generator = seeded(draw(seeds))
    decades, noise = draw(st.floats(0, 4)), draw(st.floats(0.01, 1))
    fall = torch.linspace(0, -decades * math.log(10), steps, dtype=DTYPE)
    signal = (fall + noise * torch.randn(steps, dtype=DTYPE, generator=generator)).exp()
    support = torch.rand(steps, generator=generator) < 0.7
    support[int(torch.randint(steps, (), generator=generator))] = True
    return signal, support


def by_hand(signal, support, sign, normalization, temperature):
    """p(t) in plain Python."""
    values = [math.log(g) for g in signal] if normalization.startswith("log") else signal.tolist()
    if normalization != "none":
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        values = [(v - mean) / deviation for v in values]
    weights = [
        math.exp(sign * v / temperature) if allowed else 0.0
        for v, allowed in zip(values, support.tolist(), strict=True)
    ]
    return torch.tensor([w / sum(weights) for w in weights], dtype=DTYPE)


def effective(probabilities):
    """exp(entropy)."""
    return math.exp(-sum(p * math.log(p) for p in probabilities.tolist() if p > 0))


@pytest.mark.parametrize("normalization", ["log_standardize", "standardize", "none"])
@given(profiles(), signs, temperatures)
def test_softmax_is_the_stated_formula(normalization, profile, sign, temperature):
    signal, support = profile
    found = Softmax(normalization, temperature)(signal, support, sign)
    expected = by_hand(signal, support, sign, normalization, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@given(profiles(), signs, st.floats(1e-3, 1e3), st.floats(0.2, 5))
def test_the_default_depends_on_neither_the_scale_nor_the_number_of_decades(
    profile, sign, scale, power
):
    signal, support = profile
    one = Softmax()(signal, support, sign)
    other = Softmax()(scale * signal**power, support, sign)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


def test_raw_norms_depend_on_the_scale():
    signal = torch.logspace(0.5, -2, 100, dtype=DTYPE)
    everywhere = torch.ones(100, dtype=torch.bool)
    spread = [effective(Softmax("none")(c * signal, everywhere)) for c in (0.1, 1, 100)]
    assert spread[0] > 95
    assert 20 < spread[1] < 90
    assert spread[2] < 2


@given(profiles(), signs, st.sampled_from([Softmax(), Softmax("none"), EffectiveSteps(0.4)]))
def test_large_values_are_preferred_or_with_the_other_sign_small_ones(profile, sign, distribution):
    signal, support = profile
    probabilities = distribution(signal, support, sign)[support]
    assert float(probabilities.sum()) == pytest.approx(1)
    in_order = probabilities[(sign * signal[support]).argsort()]
    assert bool((in_order.diff() >= -1e-15).all())


@given(profiles(least=8), signs, st.floats(0.05, 1))
def test_the_solved_temperature_gives_the_wanted_number_of_steps(profile, sign, fraction):
    signal, support = profile
    probabilities = EffectiveSteps(fraction)(signal, support, sign)
    assert bool((probabilities[~support] == 0).all())
    wanted = max(1.0, fraction * int(support.sum()))
    assert effective(probabilities) == pytest.approx(wanted, rel=1e-3)


def test_ties_bound_how_concentrated_it_can_be():
    signal = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0], dtype=DTYPE)
    everywhere = torch.ones(6, dtype=torch.bool)
    found = EffectiveSteps(0.1)(signal, everywhere)
    torch.testing.assert_close(found, torch.tensor([1, 1, 1, 0, 0, 0], dtype=DTYPE) / 3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 3e7])
@pytest.mark.parametrize("distribution", [Softmax(), Softmax("standardize"), EffectiveSteps(0.3)])
def test_a_constant_signal_gives_a_uniform_distribution(value, distribution):
    support = torch.tensor([True] * 7 + [False])
    found = distribution(torch.full((8,), value, dtype=DTYPE), support)
    torch.testing.assert_close(found, support.to(DTYPE) / 7)


@pytest.mark.parametrize("distribution", [Softmax(), EffectiveSteps(0.5)])
def test_a_zero_counts_as_the_least_value_above_it(distribution):
    everywhere = torch.ones(4, dtype=torch.bool)
    zero = distribution(torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=DTYPE), everywhere)
    least = distribution(torch.tensor([4.0, 1.0, 0.25, 0.25], dtype=DTYPE), everywhere)
    torch.testing.assert_close(zero, least)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmax("log"), r"normalization='log'.*'log_standardize'"),
        (lambda: Softmax(temperature=0), r"temperature=0.*above 0"),
        (lambda: Softmax(temperature=float("nan")), r"temperature=nan"),
        (lambda: EffectiveSteps(1.5), r"fraction=1.5.*\(0, 1\]"),
        (lambda: EffectiveSteps(0.0), r"fraction=0.0.*\(0, 1\]"),
        (lambda: EffectiveSteps(0.5, "z"), r"normalization='z'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(bilevel.ConfigurationError, match=message):
        make()
