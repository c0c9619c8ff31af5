"""The window that ends at the iterate nearest to a target, and the signals it needs."""

import problems
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded

import bilevel
from bilevel.truncation import MinimumDistance

#: Few values, so that ties are frequent.
distances = st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf"), float("nan")]), min_size=1)
NAMES = {"l1": "l1_distance", "squared_l2": "squared_l2_distance"}


def trace(distance, values):
    values = torch.tensor(values, dtype=torch.float64)
    return bilevel.Trace({"inner_loss": torch.zeros(len(values)), NAMES[distance]: values})


@given(st.sampled_from(sorted(NAMES)), distances, st.data())
def test_the_nearest_iterate_is_chosen_and_the_later_one_of_a_tie(distance, values, data):
    minimum = data.draw(st.integers(1, len(values)))
    schedule = MinimumDistance(distance, minimum)
    window = schedule.select(trace(distance, values), seeded(0))
    assert window.start == 0
    assert minimum <= window.stop <= len(values)
    comparable = [float("inf") if value != value else value for value in values]
    chosen = comparable[window.stop - 1]
    assert all(chosen <= value for value in comparable[minimum - 1 :])
    assert all(chosen < value for value in comparable[window.stop :])


@given(st.integers(1, 20), st.data())
def test_the_whole_run_is_recorded_and_kept(steps, data):
    minimum = data.draw(st.integers(1, steps))
    schedule = MinimumDistance(minimum=minimum)
    assert schedule.minimum_steps == minimum
    expected = bilevel.truncation.Plan(steps, signals=("l1_distance",))
    assert schedule.plan(steps, seeded(0)) == expected


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_a_wrong_minimum_is_named(value):
    with pytest.raises(bilevel.ConfigurationError, match=r"minimum=.*at least 1"):
        MinimumDistance(minimum=value)


def test_a_wrong_distance_is_named():
    with pytest.raises(bilevel.ConfigurationError, match="distance='l2': it must be one of 'l1'"):
        MinimumDistance("l2")


def test_a_run_shorter_than_the_minimum_is_refused():
    case = problems.make("quadratic", 0)
    with pytest.raises(bilevel.ConfigurationError, match="steps=4: MinimumDistance needs at least"):
        bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 4, MinimumDistance(minimum=5))


class Measured(problems.Quadratic):
    """Supplies the distances to the point that the outer loss is about, or something wrong."""

    supplied = ("l1_distance", "squared_l2_distance")

    def signals(self, params, outer):
        difference = params["theta"] - outer["target"]
        values = {
            "l1_distance": difference.abs().sum(),
            "squared_l2_distance": (difference**2).sum(),
        }
        return {name: values[name] for name in self.supplied}

    def outer_loss(self, params, outer, batch):
        return ((params["theta"] - outer["target"]) ** 2).sum()


def measured(seed):
    case = problems.make("quadratic", seed)
    problem = Measured(case.problem.A, case.problem.B, case.problem.start)
    return problem, {**case.outer, "target": case.outer_batch}


@given(st.sampled_from(sorted(NAMES)), st.integers(1, 12), st.integers(0, 999))
def test_signals_of_the_problem_are_those_of_the_iterate_after_each_step(distance, steps, seed):
    problem, outer = measured(seed)
    result = bilevel.Hypergradient(
        problem, bilevel.optim.sgd(0.3), steps, MinimumDistance(distance)
    )(outer, None, seeded(seed))
    order = {"l1": 1, "squared_l2": 2}[distance]
    theta, expected = problem.start, []
    for _ in range(steps):
        theta = theta - 0.3 * (problem.A @ theta - problem.B @ outer["phi"])
        expected.append(((theta - outer["target"]).abs() ** order).sum())
    found = result.trace[NAMES[distance]]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert set(result.trace) == {"inner_loss", NAMES[distance]}
    assert float(found[result.window.stop - 1]) == float(found.min())


def test_a_signal_that_nothing_supplies_is_named_with_those_that_there_are():
    problem, outer = measured(0)
    problem.supplied = ("squared_l2_distance",)
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3, MinimumDistance())
    message = (
        r"unknown signals \['l1_distance'\]; known: "
        r"\['gradient_norm', 'outer_loss', 'squared_l2_distance'\]"
    )
    with pytest.raises(bilevel.ConfigurationError, match=message):
        hypergradient(outer)


def test_a_signal_that_is_no_scalar_is_refused():
    problem, outer = measured(0)
    problem.signals = lambda params, outer: {"l1_distance": params["theta"]}
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3, MinimumDistance())
    with pytest.raises(bilevel.ProblemError, match=r"signals\(\)\['l1_distance'\] returned"):
        hypergradient(outer)
