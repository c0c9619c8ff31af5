"""StageAware: windows inside the run, drawn as stated, from one recording for several steps."""

import itertools
import math
from collections import Counter

import problems
import pytest
import torch
from goodness_of_fit import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, flat, relative_error, seeded

import bilevel
from bilevel.truncation import ByFraction, ByMetric, EffectiveSteps, Softmax, Stage, StageAware

seeds = st.integers(0, 2**31)
STAGES = {Stage.EARLY: 0.0, Stage.MIDDLE: 0.4, Stage.LATE: 0.9}
OPTIONS = list(itertools.product(["paper", "mirrored"], ["rank", "exp", "stage"], ["start", "end"]))


def schedule(stage=Stage.EARLY, window=6, width_range=3, **options):
    """A schedule that is in `stage`."""
    made = StageAware(window, width_range, ByFraction(), **options)
    made.update({"progress": STAGES[stage]})
    assert made.stage == stage
    return made


def falling(steps, seed=0, decades=2.0):
    """Gradient norms as an inner run has them: falling by some decades, with noise."""
    fall = torch.linspace(0, -decades * math.log(10), steps, dtype=DTYPE)
    return (fall + 0.3 * torch.randn(steps, dtype=DTYPE, generator=seeded(seed))).exp()


def recording(norms):
    return bilevel.Trace({"inner_loss": torch.zeros(len(norms)), "gradient_norm": norms})


def step(schedule, norms, generator):
    """One outer step over a run with these norms: (horizon, earliest start, window)."""
    plan = schedule.plan(len(norms), generator)
    assert plan.signals == (("gradient_norm",) if plan.window is None else ())
    window = plan.window or schedule.select(recording(norms[: plan.horizon]), generator)
    return plan.horizon, plan.earliest_start, window


@st.composite
def cases(draw):
    """(a schedule in any stage with any options, the norms of a run that is long enough)."""
    window = draw(st.integers(1, 12))
    width_range = draw(st.integers(0, window - 1))
    position, width, anchor = draw(st.sampled_from(OPTIONS))
    distribution = draw(st.sampled_from([Softmax(), Softmax("none"), EffectiveSteps(0.3)]))
    made = schedule(
        draw(st.sampled_from(list(Stage))),
        window,
        width_range,
        distribution=distribution,
        position=position,
        width=width,
        anchor=anchor,
        refresh=draw(st.integers(1, 4)),
    )
    steps = draw(st.integers(made.minimum_steps, made.minimum_steps + 30))
    norms = falling(steps, draw(st.integers(0, 1000)), draw(st.floats(0, 4)))
    return made, torch.zeros_like(norms) if draw(st.integers(0, 9)) == 0 else norms


@given(cases(), seeds)
def test_windows_lie_inside_the_run_and_their_widths_in_the_range(case, seed):
    made, norms = case
    generator = seeded(seed)
    for _ in range(9):
        horizon, earliest, window = step(made, norms, generator)
        assert 1 <= horizon <= len(norms)
        assert 0 <= earliest <= window.start < window.stop <= horizon
        assert abs(window.width - made.window) <= made.width_range


@given(cases(), seeds)
def test_configuration_never_changes(case, seed):
    made, norms = case
    public = {k: v for k, v in vars(made).items() if not k.startswith("_")}
    minimum, generator = made.minimum_steps, seeded(seed)
    for progress in (0.0, 0.3, 0.5, 0.8, 1.0):
        step(made, norms, generator)
        made.update({"progress": progress})
    assert {k: v for k, v in vars(made).items() if not k.startswith("_")} == public
    assert made.minimum_steps == minimum


# The stated distribution, from its formula in plain Python.


def stated(norms, stage, window, width_range, position, width, anchor):
    """P(window) by (start, stop), for the default distribution."""
    steps, g = len(norms), norms.tolist()
    change = [0.0] + [abs(b - a) for a, b in itertools.pairwise(g)]
    if stage == Stage.MIDDLE:
        w = window + (width_range if width == "stage" else 0)
        return {(s, s + w): 1 / (steps - w + 1) for s in range(steps - w + 1)}

    def z_of_log(values):
        least = min(v for v in values if v > 0)
        logs = [math.log(max(v, least)) for v in values]
        mean = sum(logs) / steps
        deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / steps)
        return [(x - mean) / deviation for x in logs]

    if width == "exp":
        largest = max(z_of_log(change))
        share = [math.exp(x - largest) for x in z_of_log(change)]
    elif width == "stage" and stage == Stage.LATE:
        share = [0.0] * steps
    else:
        share = [sum(other < d for other in change) / (steps - 1) for d in change]
    widths = [round(window - width_range + 2 * width_range * x) for x in share]
    late, x = stage == Stage.LATE, z_of_log(g)
    weights = {}
    for t, w in enumerate(widths):
        start = t if anchor == "start" else t + 1 - w
        if start < 0 or start + w > steps:
            continue
        place = (start, start + w)
        if late and position == "mirrored":
            place = (steps - start - w, steps - start)
        sign = -1 if late and position == "paper" else 1
        weights[place] = weights.get(place, 0.0) + math.exp(sign * x[t])
    total = sum(weights.values())
    return {place: weight / total for place, weight in weights.items()}


@pytest.mark.parametrize(("position", "width", "anchor"), OPTIONS)
def test_windows_are_drawn_as_stated(position, width, anchor):
    """Goodness of fit for each stage, and its power: the other stages are rejected."""
    norms, draws = falling(24, seed=3), 3000
    options = {"position": position, "width": width, "anchor": anchor}
    expected = {stage: stated(norms, stage, 6, 3, **options) for stage in Stage}
    for stage in Stage:
        made, generator = schedule(stage, refresh=100, **options), seeded(5)
        windows = [step(made, norms, generator)[2] for _ in range(draws)]
        counts = Counter((window.start, window.stop) for window in windows)
        assert p_value(counts, expected[stage], draws) > 1e-4
        for other in set(Stage) - {stage}:
            assert p_value(counts, expected[other], draws) < 1e-12


@settings(max_examples=15)
@given(st.sampled_from(list(Stage)), st.sampled_from(OPTIONS), st.integers(10, 40), seeds)
def test_windows_are_drawn_as_stated_whatever_the_norms(stage, options, steps, seed):
    options = dict(zip(("position", "width", "anchor"), options, strict=True))
    norms, draws = falling(steps, seed=seed % 1000), 1000
    made, generator = schedule(stage, refresh=draws, **options), seeded(seed)
    windows = [step(made, norms, generator)[2] for _ in range(draws)]
    counts = Counter((window.start, window.stop) for window in windows)
    assert p_value(counts, stated(norms, stage, 6, 3, **options), draws) > 1e-6


def test_the_test_of_fit_rejects_a_wrong_temperature():
    norms, draws = falling(24, seed=3), 3000
    made = schedule(distribution=Softmax(temperature=1.2), refresh=100)
    generator = seeded(5)
    windows = [step(made, norms, generator)[2] for _ in range(draws)]
    counts = Counter((window.start, window.stop) for window in windows)
    expected = stated(norms, Stage.EARLY, 6, 3, "paper", "rank", "start")
    assert p_value(counts, expected, draws) < 1e-4


@pytest.mark.parametrize("anchor", ["start", "end"])
def test_without_any_change_of_the_norms_every_window_has_the_base_width(anchor):
    made = schedule(anchor=anchor, refresh=2000)
    windows = [step(made, torch.ones(24, dtype=DTYPE), seeded(seed))[2] for seed in range(2000)]
    assert {window.width for window in windows} == {6}
    assert {window.start for window in windows} == set(range(24 - 6 + 1))


@given(st.sampled_from(list(Stage)), seeds, st.floats(1e-3, 1e3))
def test_a_multiple_of_the_loss_gives_the_same_windows(stage, seed, scale):
    one, other = (schedule(stage, refresh=2) for _ in range(2))
    norms = falling(20, seed % 1000)
    generators = seeded(seed), seeded(seed)
    for _ in range(4):
        found = step(one, norms, generators[0])
        assert found == step(other, scale * norms, generators[1])


def test_the_report_shows_the_distribution_that_is_drawn_from():
    made, norms, draws = schedule(Stage.LATE, refresh=10**6), falling(24), 4000
    generator = seeded(0)
    starts = [step(made, norms, generator)[2].start for _ in range(draws)]
    shown = made.report()
    assert shown["stage"] == Stage.LATE
    assert shown["start_probability"].shape == (24,)
    frequency = torch.bincount(torch.tensor(starts), minlength=24) / draws
    torch.testing.assert_close(shown["start_probability"], frequency.double(), atol=0.03, rtol=0)
    expected = stated(norms, Stage.LATE, 6, 3, "paper", "rank", "start")
    entropy = -sum(p * math.log(p) for p in expected.values())
    assert shown["effective_windows"] == pytest.approx(math.exp(entropy))


# One recording serves `refresh` outer steps.


@given(st.sampled_from([Stage.EARLY, Stage.LATE]), st.integers(1, 5), st.integers(1, 14), seeds)
def test_a_kept_distribution_needs_no_step_past_the_window(stage, refresh, count, seed):
    made, generator = schedule(stage, refresh=refresh), seeded(seed)
    recorded = falling(30, 1)
    for index in range(count):
        # What is recorded in between is not looked at.
        norms = recorded if index % refresh == 0 else falling(30, index + 2)
        horizon, earliest, window = step(made, norms, generator)
        if index % refresh == 0:
            assert (horizon, earliest) == (30, 0)
        else:
            assert (horizon, earliest) == (window.stop, window.start)
        if index % refresh == 0:
            fresh = schedule(stage)
            step(fresh, norms, seeded(0))
        shown, expected = made.report(), fresh.report()
        assert torch.equal(shown["start_probability"], expected["start_probability"])


@given(seeds)
def test_the_middle_stage_needs_no_recording(seed):
    made, generator = schedule(Stage.MIDDLE), seeded(seed)
    for _ in range(6):
        horizon, earliest, window = step(made, falling(30), generator)
        assert (horizon, earliest) == (window.stop, window.start)


def test_a_new_stage_begins_with_a_recording_of_its_own():
    made, generator, norms = schedule(refresh=100), seeded(0), falling(30)
    for _ in range(3):
        step(made, norms, generator)
    assert made.update({"progress": 0.9}) is not None
    assert step(made, norms, generator)[0] == 30
    assert step(made, norms, generator)[0] < 30


def test_a_run_of_another_length_begins_with_a_recording_of_its_own():
    made, generator = schedule(refresh=100), seeded(0)
    for steps in (30, 20, 30):
        assert step(made, falling(steps), generator)[0] == steps


def test_two_schedules_with_one_transition_have_stages_of_their_own():
    transition = ByFraction()
    one, other = StageAware(6, 3, transition), StageAware(6, 3, transition)
    one.update({"progress": 1.0})
    assert (one.stage, other.stage, transition.stage) == (Stage.LATE, Stage.EARLY, Stage.EARLY)


def test_the_metric_that_its_transition_reads_is_asked_for():
    assert tuple(StageAware(6, 3, ByMetric("recall")).metrics) == ("recall",)
    assert tuple(StageAware(6, 3, ByFraction()).metrics) == ("progress",)


# State.


@given(cases(), seeds, st.integers(0, 7))
def test_state_round_trips_and_the_sequence_goes_on(case, seed, before):
    one, norms = case
    other = StageAware(
        one.window,
        one.width_range,
        ByFraction(),
        one.distribution,
        one.position,
        one.width,
        one.anchor,
        one.refresh,
    )
    generator = seeded(seed)
    for index in range(before):
        step(one, norms, generator)
        one.update({"progress": index / 10})
    resumed = torch.Generator()
    resumed.set_state(generator.get_state())
    other.load_state_dict(one.state_dict())
    assert set(other.state_dict()) == set(one.state_dict())
    assert str(other.report()) == str(one.report())
    for index in range(before, 10):
        assert step(one, norms, generator) == step(other, norms, resumed)
        assert one.update({"progress": index / 10}) == other.update({"progress": index / 10})


@pytest.mark.parametrize(
    "change",
    [
        {"uses_left": 3},
        {"uses_left": -1},
        {"uses_left": None},
        {"selection.probabilities": torch.ones(3)},
        {"selection.starts": torch.tensor([0, 1])},
        {"selection.stops": torch.zeros(22, dtype=torch.int64)},
        {"selection.steps": 4},
        {"transition.progress": "late"},
        {"transition.stage": 1},
    ],
    ids=str,
)
def test_a_wrong_state_is_refused(change):
    made = schedule(refresh=3)
    step(made, falling(24), seeded(0))
    state = made.state_dict()
    StageAware(6, 3, ByFraction(), refresh=3).load_state_dict(state)
    with pytest.raises(bilevel.ConfigurationError):
        StageAware(6, 3, ByFraction(), refresh=3).load_state_dict({**state, **change})


# In a hypergradient.


class Counted(problems.Quadratic):
    """Remembers for which inner steps a batch was made."""

    def inner_batch(self, outer, step, *, generator):
        self.steps.append(step)
        return super().inner_batch(outer, step, generator=generator)


@settings(max_examples=15)
@given(st.sampled_from(list(Stage)), st.integers(1, 3), seeds)
def test_it_is_exact_for_its_window_and_runs_nothing_twice(stage, refresh, seed):
    case = problems.quadratic(seeded(seed % 100))
    counted = Counted(case.problem.A, case.problem.B, case.problem.start)
    counted.steps = []
    case = problems.Case(counted, case.outer, case.outer_batch)
    optimizer, made = bilevel.optim.sgd(0.1), schedule(stage, 3, 2, refresh=refresh)
    hypergradient = bilevel.Hypergradient(counted, optimizer, 12, made)
    hypergradient(case.outer, case.outer_batch, seeded(seed))  # its checks look at one batch more
    for index in range(1, 4):
        counted.steps.clear()
        result = hypergradient(case.outer, case.outer_batch, seeded(seed + index))
        steps, window = Counter(counted.steps), result.window
        full = stage != Stage.MIDDLE and index % refresh == 0
        run = 12 if full else window.stop
        assert steps == Counter(range(run))
        assert result.trace.horizon == run
        assert ("gradient_norm" in result.trace) == full
        key = bilevel.Key.draw(seeded(seed + index))
        loss, grads = problems.brute_force(case, optimizer, key, window)
        assert relative_error(result.loss, loss) < 1e-10
        assert relative_error(flat(result.grads), flat(grads)) < 1e-8


def test_a_diverging_run_is_named_and_the_next_one_is_recorded_anew():
    made, generator = schedule(refresh=5), seeded(0)
    norms = falling(24)
    norms[7] = math.inf
    for _ in range(2):
        with pytest.raises(bilevel.NonFiniteError, match="became inf at inner step 7 of 24"):
            step(made, norms, generator)
    assert step(made, falling(24), generator)[0] == 24
    assert step(made, falling(24), generator)[0] < 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.0}, "window=2.0"),
        ({"width_range": -1}, "width_range=-1"),
        ({"width_range": 6}, "width_range=6.*below window=6"),
        ({"transition": ByFraction}, "transition is the class ByFraction.*ByMetric()"),
        ({"distribution": Softmax}, "distribution is the class Softmax.*Softmax()"),
        ({"position": "released"}, "position='released'.*'paper', 'mirrored'"),
        ({"width": 3}, "width=3.*'rank', 'exp', 'stage'"),
        ({"anchor": "middle"}, "anchor='middle'.*'start', 'end'"),
        ({"refresh": 0}, "refresh=0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(bilevel.ConfigurationError, match=message):
        StageAware(**{"window": 6, "width_range": 3, "transition": ByFraction(), **options})


def test_a_run_that_is_too_short_is_refused():
    case = problems.quadratic(seeded(0))
    with pytest.raises(bilevel.ConfigurationError, match=r"steps=8.*at least 9"):
        bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 8, schedule())
