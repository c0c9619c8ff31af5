"""Schedules: windows inside the run, the stated distribution, and state that resumes."""

from collections import Counter

import problems
import pytest
import torch
from goodness_of_fit import p_value
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded

import bilevel
from bilevel.truncation import Full, Last, Plan, RandomWindow

seeds = st.integers(0, 2**31)


@st.composite
def shapes(draw):
    """(window, steps) with 1 ≤ window ≤ steps."""
    steps = draw(st.integers(1, 60))
    return draw(st.integers(1, steps)), steps


def draw(schedule, steps, generator):
    """The window of an outer step, for which nothing else is run, kept or recorded."""
    plan = schedule.plan(steps, generator)
    assert plan == Plan(plan.window.stop, plan.window, plan.window.start)
    return plan.window


def schedules(window):
    return [Full(), Last(window), RandomWindow(window), RandomWindow(window, refresh=3)]


@given(shapes(), seeds)
def test_windows_lie_inside_the_run_and_are_as_wide_as_asked(shape, seed):
    width, steps = shape
    for schedule in schedules(width):
        generator = seeded(seed)
        for _ in range(7):
            window = draw(schedule, steps, generator)
            assert 0 <= window.start < window.stop <= steps
            assert window.width == (steps if isinstance(schedule, Full) else width)


@given(shapes())
def test_full_is_everything_and_last_is_the_end(shape):
    width, steps = shape
    assert draw(Full(), steps, seeded(0)) == bilevel.Window(0, steps)
    assert draw(Last(width), steps, seeded(0)) == bilevel.Window(steps - width, steps)


@pytest.mark.parametrize(("width", "steps", "refresh"), [(1, 10, 1), (5, 16, 1), (40, 50, 2)])
def test_the_random_stop_is_uniform(width, steps, refresh):
    """Chi-square goodness of fit over {W, …, T}."""
    schedule, generator, draws = RandomWindow(width, refresh), seeded(1), 4000
    stops = []
    for _ in range(draws * refresh):
        stops.append(draw(schedule, steps, generator).stop)
    counts = Counter(stops[::refresh])
    places = range(width, steps + 1)
    assert set(counts) == set(places)
    assert p_value(counts, dict.fromkeys(places, 1 / len(places)), draws) > 1e-4


@given(st.integers(1, 6), st.integers(1, 30), seeds)
def test_one_draw_serves_refresh_outer_steps(refresh, count, seed):
    """The stops are those that a schedule without refresh draws, each repeated."""
    generator, same = seeded(seed), seeded(seed)
    often, seldom = RandomWindow(5), RandomWindow(5, refresh)
    stops = [draw(seldom, 1000, generator).stop for _ in range(count)]
    drawn = [draw(often, 1000, same).stop for _ in range(-(-count // refresh))]
    assert stops == [drawn[index // refresh] for index in range(count)]
    assert torch.equal(generator.get_state(), same.get_state())


@given(shapes(), st.integers(1, 5), seeds, st.integers(0, 12))
def test_state_round_trips_and_the_sequence_goes_on(shape, refresh, seed, before):
    width, steps = shape
    one, generator = RandomWindow(width, refresh), seeded(seed)
    for _ in range(before):
        draw(one, steps, generator)
    other, resumed = RandomWindow(width, refresh), torch.Generator()
    resumed.set_state(generator.get_state())
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    for _ in range(8):
        assert draw(one, steps, generator) == draw(other, steps, resumed)


@given(shapes(), seeds)
def test_configuration_never_changes(shape, seed):
    width, steps = shape
    for schedule in schedules(width):
        state = set(schedule.state_dict())
        minimum, generator = schedule.minimum_steps, seeded(seed)
        public = {k: v for k, v in vars(schedule).items() if not k.startswith("_")}
        for _ in range(5):
            draw(schedule, steps, generator)
            schedule.update({"loss": 1.0})
        assert {k: v for k, v in vars(schedule).items() if not k.startswith("_")} == public
        assert schedule.minimum_steps == minimum
        assert set(schedule.state_dict()) == state


@pytest.mark.parametrize("schedule", [Full(), Last(2)])
def test_a_schedule_without_state_takes_an_empty_one_only(schedule):
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})
    with pytest.raises(bilevel.ConfigurationError, match=r"no state.*stop"):
        schedule.load_state_dict(RandomWindow(2).state_dict())


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"stop": 3},
        {"uses_left": 1},
        {"stop": "soon", "uses_left": 1},
        {"stop": None, "uses_left": 1},
        {"stop": 1, "uses_left": 1},  # a stop below the window's width of 2
        {"stop": 3, "uses_left": -1},
    ],
)
def test_a_wrong_state_is_refused(state):
    with pytest.raises(bilevel.ConfigurationError):
        RandomWindow(2, refresh=3).load_state_dict(state)


def test_a_kept_draw_never_exceeds_a_shorter_run():
    """A state saved in a long run, continued with fewer inner steps."""
    long, short = RandomWindow(2, refresh=10), RandomWindow(2, refresh=10)
    assert draw(long, 100, seeded(0)).stop > 5
    short.load_state_dict(long.state_dict())
    assert draw(short, 5, seeded(0)).stop <= 5


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_bad_arguments_are_named(value):
    for make in (Last, RandomWindow):
        with pytest.raises(bilevel.ConfigurationError, match=r"window=.*at least 1"):
            make(value)
    with pytest.raises(bilevel.ConfigurationError, match=r"refresh=.*at least 1"):
        RandomWindow(2, refresh=value)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2)])
def test_a_window_is_neither_empty_nor_negative(start, stop):
    with pytest.raises(bilevel.ConfigurationError, match=rf"window \[{start}, {stop}\)"):
        bilevel.Window(start, stop)


class Counted(problems.Quadratic):
    """Remembers for which inner steps a batch was made."""

    def inner_batch(self, outer, step, *, generator):
        self.steps.append(step)
        return super().inner_batch(outer, step, generator=generator)


@pytest.mark.parametrize("estimator", [bilevel.estimators.Reverse(), bilevel.estimators.Adjoint()])
@given(shapes(), seeds)
def test_no_step_past_the_stop_is_ever_run(estimator, shape, seed):
    width, steps = shape
    case = problems.quadratic(seeded(0))
    counted = Counted(case.problem.A, case.problem.B, case.problem.start)
    counted.steps = []
    hypergradient = bilevel.Hypergradient(
        counted, bilevel.optim.sgd(0.01), steps, RandomWindow(width), estimator
    )
    hypergradient(case.outer, case.outer_batch, seeded(seed))  # its checks look at one batch more
    counted.steps.clear()
    window = hypergradient(case.outer, case.outer_batch, seeded(seed + 1)).window
    assert Counter(counted.steps) == Counter(range(window.stop))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "earliest_start=0, horizon=0"),
        ({"horizon": 5, "earliest_start": 5}, "earliest_start=5, horizon=5"),
        ({"horizon": 5, "earliest_start": -1}, "earliest_start=-1"),
        ({"horizon": 5, "window": bilevel.Window(2, 6)}, r"window=\[2, 6\).*\[0, 5\)"),
        (
            {"horizon": 5, "window": bilevel.Window(0, 5), "earliest_start": 1},
            r"\[0, 5\).*\[1, 5\)",
        ),
        ({"horizon": 5, "window": bilevel.Window(0, 5), "signals": ("norm",)}, "signals=.*norm"),
    ],
    ids=str,
)
def test_a_plan_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(bilevel.ConfigurationError, match=message):
        Plan(**options)


class Planned(bilevel.truncation.Truncation):
    """Makes one plan, and selects nothing."""

    minimum_steps = 1

    def __init__(self, plan):
        self.made = plan

    def plan(self, steps, generator):
        return self.made


def test_a_plan_beyond_the_run_or_without_a_window_is_named():
    case = problems.make("quadratic", 0)
    for plan, error, message in (
        (Plan(6), bilevel.ConfigurationError, r"Plan.horizon=6: .* in \[1, 5\]"),
        (Plan(5), NotImplementedError, "Planned has no window, so it must define select"),
    ):
        hypergradient = bilevel.Hypergradient(
            case.problem, bilevel.optim.sgd(0.1), 5, Planned(plan)
        )
        with pytest.raises(error, match=message):
            hypergradient(case.outer, case.outer_batch, seeded(0))
