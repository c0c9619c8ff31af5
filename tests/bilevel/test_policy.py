"""WithinTrajectoryPolicy: the published recursion, the draws, and state that resumes."""

import itertools
import math
from collections import Counter

import pytest
import torch
from goodness_of_fit import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, seeded

import bilevel
from bilevel.truncation import WithinTrajectoryPolicy

seeds = st.integers(0, 2**31)


def norms_of_run(steps, seed):
    scale = 10 ** float(torch.randn((), generator=seeded(seed)))
    fall = torch.linspace(0, -3, steps, dtype=DTYPE)
    return scale * (fall + 0.5 * torch.randn(steps, dtype=DTYPE, generator=seeded(seed))).exp()


def step(policy, norms, generator):
    plan = policy.plan(len(norms), generator)
    assert plan == bilevel.truncation.Plan(len(norms), signals=("gradient_norm",))
    trace = bilevel.Trace({"inner_loss": torch.zeros(len(norms)), "gradient_norm": norms})
    return policy.select(trace, generator)


def z_scores(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / deviation if deviation else 0.0 for v in values]


class ByHand:
    """The recursion in plain Python."""

    def __init__(self, steps, window, width_range, weight, rate, temperature, partial):
        self.partial = partial
        self.reference, self.means = [1 / steps] * steps, []
        self.window, self.width_range = window, width_range
        self.weight, self.rate, self.temperature = weight, rate, temperature

    def step(self, norms):
        """(β, P(window) by (start, stop))."""
        g = norms.tolist()
        self.means.append(sum(g) / len(g))
        low, high = min(self.means), max(self.means)
        beta = 1.0 if high == low else 2 * (self.means[-1] - low) / (high - low) - 1
        weights = [
            p * math.exp(beta * a / self.weight)
            for p, a in zip(self.reference, z_scores(g), strict=True)
        ]
        policy = [w / sum(weights) for w in weights]
        self.reference = [
            (1 - self.rate) * p + self.rate * q for p, q in zip(self.reference, policy, strict=True)
        ]
        change = [0.0] + [abs(b - a) for a, b in itertools.pairwise(g)]
        windows = {}
        for t, (p, z) in enumerate(zip(policy, z_scores(change), strict=True)):
            share = 1 / (1 + math.exp(-z / self.temperature))
            width = round(self.window - self.width_range + 2 * self.width_range * share)
            if self.partial == "cut":
                width = min(width, t + 1)
            if width <= t + 1:
                windows[t + 1 - width, t + 1] = p
        total = sum(windows.values())
        return beta, {window: p / total for window, p in windows.items()}


@st.composite
def cases(draw):
    """(steps, window, R, λ, ρ, τ_w, what becomes of partial windows)."""
    window = draw(st.integers(1, 10))
    width_range = draw(st.integers(0, window - 1))
    steps = draw(st.integers(max(2, window + width_range), 30))
    weights = [draw(st.floats(0.3, 4)), draw(st.floats(0.01, 0.5)), draw(st.floats(0.3, 3))]
    return steps, window, width_range, *weights, draw(st.sampled_from(["excluded", "cut"]))


@given(cases(), st.integers(1, 6), seeds)
def test_the_policy_follows_the_recursion(case, count, seed):
    steps, *arguments = case
    policy, by_hand = WithinTrajectoryPolicy(*arguments), ByHand(steps, *arguments)
    generator = seeded(seed)
    for index in range(count):
        norms = norms_of_run(steps, seed % 1000 + index)
        window = step(policy, norms, generator)
        beta, windows = by_hand.step(norms)
        assert (window.start, window.stop) in windows
        shown = policy.report()
        assert shown["beta"] == pytest.approx(beta)
        expected = torch.zeros(steps, dtype=DTYPE)
        for (start, _), p in windows.items():
            expected[start] += p
        torch.testing.assert_close(shown["start_probability"], expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(
        policy.state_dict()["reference"], torch.tensor(by_hand.reference, dtype=DTYPE)
    )


def drawn(steps, partial, runs, draws, generator):
    """How often each window is drawn in the last of some runs, and the stated probabilities."""
    arguments = (5, 3, 1.0, 0.3, 1.0, partial)
    policy, by_hand = WithinTrajectoryPolicy(*arguments), ByHand(steps, *arguments)
    for run in runs:
        state, norms = policy.state_dict(), norms_of_run(steps, run)
        step(policy, norms, generator)
        expected = by_hand.step(norms)[1]
    counts = Counter()
    for _ in range(draws):
        policy.load_state_dict(state)
        window = step(policy, norms, generator)
        counts[window.start, window.stop] += 1
    assert set(counts) <= set(expected)
    return counts, expected


@pytest.mark.parametrize("partial", ["excluded", "cut"])
def test_windows_are_drawn_from_the_policy(partial):
    """Goodness of fit after a few runs, and its power: a uniform end is rejected."""
    draws = 3000
    counts, expected = drawn(16, partial, range(3), draws, seeded(2))
    assert p_value(counts, expected, draws) > 1e-4
    assert p_value(counts, dict.fromkeys(expected, 1 / len(expected)), draws) < 1e-12


@settings(max_examples=5)
@given(st.integers(12, 30), st.sampled_from(["excluded", "cut"]), st.integers(0, 3), seeds)
def test_windows_are_drawn_from_the_policy_whatever_the_norms(steps, partial, runs, seed):
    draws, first = 1000, seed % 1000
    counts, expected = drawn(steps, partial, range(first, first + runs + 1), draws, seeded(seed))
    assert p_value(counts, expected, draws) > 1e-6


@given(cases(), seeds)
def test_windows_lie_inside_the_run_and_are_narrower_only_where_its_start_cuts_them(case, seed):
    steps, window_width, width_range, *_ = case
    policy, generator = WithinTrajectoryPolicy(*case[1:]), seeded(seed)
    for index in range(5):
        window = step(policy, norms_of_run(steps, seed % 1000 + index), generator)
        assert 0 <= window.start < window.stop <= steps
        assert window.width <= window_width + width_range
        cut = case[-1] == "cut" and window.start == 0
        assert window.width >= window_width - width_range or cut


def test_large_norms_are_preferred_at_the_running_maximum_and_small_ones_at_the_minimum():
    policy, generator = WithinTrajectoryPolicy(2, 0), seeded(0)
    falling = torch.logspace(1, -1, 20, dtype=DTYPE)
    betas, starts = [], []
    for scale in (1.0, 3.0, 0.5, 1.75):
        step(policy, scale * falling, generator)
        shown = policy.report()
        betas.append(shown["beta"])
        starts.append(float((shown["start_probability"] * torch.arange(20)).sum()))
    assert betas == pytest.approx([1, 1, -1, 0])
    assert starts[1] < starts[0] < starts[2]


@given(cases(), seeds, st.integers(0, 5))
def test_state_round_trips_and_the_sequence_goes_on(case, seed, before):
    steps, *arguments = case
    one, other = WithinTrajectoryPolicy(*arguments), WithinTrajectoryPolicy(*arguments)
    generator, resumed = seeded(seed), torch.Generator()
    public = {k: v for k, v in vars(one).items() if not k.startswith("_")}
    for index in range(before):
        step(one, norms_of_run(steps, index), generator)
    resumed.set_state(generator.get_state())
    other.load_state_dict(one.state_dict())
    for index in range(before, 8):
        norms = norms_of_run(steps, index)
        assert step(one, norms, generator) == step(other, norms, resumed)
        assert str(one.report()) == str(other.report())
    assert {k: v for k, v in vars(one).items() if not k.startswith("_")} == public


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"reference": torch.ones(4) / 4},
        {"reference": torch.ones(4) / 4, "extremes": torch.empty(0)},
        {"reference": torch.ones(2, 2) / 4, "extremes": torch.ones(2)},
        {"reference": [0.5, 0.5], "extremes": torch.ones(2)},
    ],
    ids=str,
)
def test_a_wrong_state_is_refused(state):
    with pytest.raises(bilevel.ConfigurationError, match="cannot continue"):
        WithinTrajectoryPolicy(2, 1).load_state_dict(state)


def test_a_run_of_another_length_is_refused_with_both_numbers():
    policy = WithinTrajectoryPolicy(2, 1)
    step(policy, norms_of_run(10, 0), seeded(0))
    with pytest.raises(bilevel.ConfigurationError, match="runs of 10 inner steps; this one has 12"):
        step(policy, norms_of_run(12, 0), seeded(0))


def test_a_diverging_run_is_named_and_leaves_the_policy_as_it_was():
    policy = WithinTrajectoryPolicy(2, 1)
    step(policy, norms_of_run(10, 0), seeded(0))
    before, norms = str(policy.state_dict()), norms_of_run(10, 1)
    norms[4] = math.nan
    with pytest.raises(bilevel.NonFiniteError, match="became nan at inner step 4 of 10"):
        step(policy, norms, seeded(0))
    assert str(policy.state_dict()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"width_range": 4}, "width_range=4.*below window=4"),
        ({"kl_weight": 0}, "kl_weight=0"),
        ({"reference_rate": 1.5}, r"reference_rate=1.5.*\(0, 1\]"),
        ({"width_temperature": -1.0}, r"width_temperature=-1\.0"),
        ({"partial_windows": "kept"}, "partial_windows='kept'.*'excluded', 'cut'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(bilevel.ConfigurationError, match=message):
        WithinTrajectoryPolicy(**{"window": 4, "width_range": 2, **options})
