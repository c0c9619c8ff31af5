"""Compiled runs are loops, and give what autograd gives through every step."""

import warnings

import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Fixed, relative_error, seeded

import bilevel
from bilevel.compiler import Compiler
from bilevel.estimators import (
    Adjoint,
    FiniteDifference,
    FirstOrder,
    Forward,
    Implicit,
    LowRank,
    Penalty,
    Reverse,
)
from bilevel.recording import stacking

EXACT = 1e-8
STEPS = 12
OPTIMIZERS = {
    "sgd": bilevel.optim.sgd(0.1, momentum=0.9),
    "adam": bilevel.optim.adam(0.05, eps_root=1e-6),
    "per leaf": bilevel.optim.groups({"*": bilevel.optim.sgd(0.1)}),
}


def hypergradient(case, optimizer, truncation, *, backend="eager", steps=STEPS, **options):
    made = bilevel.Hypergradient(
        case.problem, optimizer, steps, truncation, compile=backend is not None, **options
    )
    if backend is not None:
        made.inner.compiler = Compiler(backend)
    return made


@settings(max_examples=7)
@given(
    name=st.sampled_from(
        ["quadratic", "ridge", "data_cleaning", "mlp_distillation", "learned_start"]
    ),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    window=st.tuples(st.integers(0, STEPS - 1), st.integers(1, STEPS)).filter(
        lambda w: w[0] < w[1]
    ),
    keep_every=st.sampled_from([None, 1, 2, 5]),
    block_bytes=st.sampled_from([1, 400, 2**22]),
    graph_budget=st.sampled_from([None, 0]),
)
def test_every_way_through_a_window(name, optimizer, window, keep_every, block_bytes, graph_budget):
    """Blocks of any length, iterates kept or recomputed, inputs kept or made again."""
    case = problems.make(name, seed=window[0])
    chosen = OPTIMIZERS[optimizer]
    made = hypergradient(
        case, chosen, Fixed(*window), keep_every=keep_every, graph_budget=graph_budget
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(stacking, "BLOCK_BYTES", block_bytes)
        patch.setattr("bilevel.recording.rollout.BLOCK_BYTES", block_bytes)
        for seed in range(2):
            found = made(case.outer, case.outer_batch, seeded(seed))
            expected = hypergradient(
                case, chosen, Fixed(*window), backend=None, estimator=Reverse()
            )(case.outer, case.outer_batch, seeded(seed))
            assert relative_error(found.grads, expected.grads) < EXACT
            assert relative_error(found.params, expected.params) < 1e-12
            torch.testing.assert_close(found.trace["inner_loss"], expected.trace["inner_loss"])


class AfterTheRun(bilevel.truncation.Truncation):
    """A window that is chosen when the run is over, from the signals it asks for."""

    minimum_steps = STEPS

    def __init__(self, *signals):
        self.asked = signals

    def plan(self, steps, generator):
        return bilevel.truncation.Plan(horizon=steps, signals=self.asked)

    def select(self, trace, generator):
        assert set(trace) == {"inner_loss", *self.asked}
        return bilevel.Window(3, 9)


@pytest.mark.parametrize("signals", [("gradient_norm",), ("outer_loss",), ("outer_loss", "size")])
def test_signals_come_out_of_the_loop(signals):
    case = problems.make("ridge", 0)
    case.problem.signals = lambda params, outer: {"size": (params**2).sum()}
    results = [
        hypergradient(case, OPTIMIZERS["sgd"], AfterTheRun(*signals), backend=backend)(
            case.outer, case.outer_batch, seeded(0)
        )
        for backend in ("eager", None)
    ]
    assert relative_error(results[0].grads, results[1].grads) < EXACT
    torch.testing.assert_close(dict(results[0].trace), dict(results[1].trace))


@pytest.mark.parametrize(
    "estimator",
    [FiniteDifference(), FirstOrder(), Forward(), LowRank(), Penalty(steps=8), Adjoint("forward")],
)
def test_other_estimators_follow_a_run_made_as_a_loop(estimator):
    case = problems.make("ridge", 0)
    results = [
        hypergradient(case, OPTIMIZERS["sgd"], Fixed(2, 7), backend=backend, estimator=estimator)(
            case.outer, case.outer_batch, seeded(0)
        )
        for backend in ("eager", None)
    ]
    assert relative_error(results[0].grads, results[1].grads) < EXACT


class Scheduled(bilevel.Problem):
    """A learned point, with a batch and a rate that depend on the step as the test says."""

    def __init__(self, rate, batch):
        self.rate, self.batch = rate, batch

    def init(self, outer, *, generator):
        return torch.zeros(3, dtype=torch.float64)

    def inner_batch(self, outer, step, *, generator):
        return {"point": outer, **self.batch(step)}

    def hyperparameters(self, outer, step):
        return {"lr": torch.tensor(self.rate(step), dtype=torch.float64)}

    def inner_loss(self, params, batch):
        distance = ((params - batch["point"]) ** 4).sum() + (params**2).sum()
        return distance * batch.get("weight", 1.0)

    def outer_loss(self, params, outer, batch):
        return (params**2).sum()


POINT = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
WEIGHTS = torch.linspace(0.5, 1.5, STEPS, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rate", "batch", "as_a_loop"),
    [
        (lambda step: 0.05, lambda step: {}, True),
        (lambda step: 0.05 * 0.9**step, lambda step: {}, True),
        (lambda step: 0.05, lambda step: {"weight": WEIGHTS[step]}, True),
        (lambda step: 0.05, lambda step: {"weight": 1.0 + step}, True),
        (lambda step: 0.05, lambda step: {"number": step % 2}, False),
        (lambda step: 0.05, lambda step: {"more": torch.ones(1 + step % 2)}, False),
        (lambda step: 0.05, lambda step: {"more": (0,) * (step % 2)}, False),
    ],
)
def test_what_steps_do_not_share_is_stacked_or_they_are_made_one_by_one(rate, batch, as_a_loop):
    case = problems.Case(Scheduled(rate, batch), POINT, None)
    made = hypergradient(case, bilevel.optim.sgd, Fixed(2, STEPS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = made(POINT, None, seeded(0))
    messages = [str(each.message) for each in caught]
    assert as_a_loop != any("are made one by one" in message for message in messages)
    expected = hypergradient(case, bilevel.optim.sgd, Fixed(2, STEPS), backend=None)(
        POINT, None, seeded(0)
    )
    assert relative_error(found.grads, expected.grads) < EXACT


def test_an_array_that_is_filled_anew_for_every_step_is_found_out():
    array = np.zeros(3)

    def batch(step):
        array[:] = step
        return {"weight": torch.from_numpy(array).mean(), "more": torch.from_numpy(array)}

    case = problems.Case(Scheduled(lambda step: 0.05, batch), POINT, None)
    with pytest.raises(bilevel.ProblemError, match="writes over memory that step"):
        hypergradient(case, bilevel.optim.sgd, Fixed(2, STEPS))(POINT, None, seeded(0))


def test_one_graph_serves_loops_of_every_length():
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    case = problems.make("ridge", 0)
    made = hypergradient(
        case, OPTIMIZERS["sgd"], bilevel.truncation.RandomWindow(4), backend=counting
    )
    starts, after = set(), []
    for seed in range(8):
        starts.add(made(case.outer, case.outer_batch, seeded(seed)).window.start)
        after.append(len(graphs))
    assert len(starts) > 3
    assert after[-1] <= 5  # steps whose iterates are kept, and not; back; the outer loss; 1 spare
    assert after[4:] == [after[-1]] * 4


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize(
    "name",
    ["data_cleaning", "learned_start", pytest.param("mlp_distillation", marks=pytest.mark.slow)],
)
def test_a_short_run_is_one_graph_with_its_derivative(name, steps):
    case = problems.make(name, 1)
    optimizer = OPTIMIZERS["adam"]
    made = hypergradient(case, optimizer, None, steps=steps)
    eager = hypergradient(case, optimizer, None, backend=None, steps=steps)
    for seed in range(2):
        found = made(case.outer, case.outer_batch, seeded(seed))
        expected = eager(case.outer, case.outer_batch, seeded(seed))
        assert found.stats.method == "one compiled graph"
        assert relative_error(found.grads, expected.grads) < EXACT
        assert relative_error(found.loss, expected.loss) < 1e-12
        torch.testing.assert_close(dict(found.trace), dict(expected.trace))
        torch.testing.assert_close(found.metrics, expected.metrics)
        assert relative_error(found.params, expected.params) < 1e-12


def test_a_loop_that_cannot_be_compiled_is_made_step_by_step():
    def no_steps(graph, example_inputs):
        raise RuntimeError("no room")

    case = problems.make("ridge", 0)
    made = hypergradient(case, OPTIMIZERS["sgd"], Fixed(2, 9), backend=no_steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = made(case.outer, case.outer_batch, seeded(0))
    assert all("no room" in str(each.message) for each in caught)
    assert sum("is run step by step" in str(each.message) for each in caught) == 2
    expected = hypergradient(case, OPTIMIZERS["sgd"], Fixed(2, 9), backend=None)(
        case.outer, case.outer_batch, seeded(0)
    )
    assert relative_error(found.grads, expected.grads) < 1e-12


def grow(rate, carry, x):
    return carry * rate + x, carry.sum()


@pytest.mark.parametrize(("wrong_calls", "refused"), [(2, 0), (1000, 1)])
def test_a_loop_is_compared_at_other_steps_before_it_is_refused(wrong_calls, refused):
    calls = []

    def wrong_at_first(graph, example_inputs):
        def call(*inputs):
            calls.append(inputs)
            factor = 1.1 if len(calls) <= wrong_calls else 1.0
            return [factor * output for output in graph(*inputs)]

        return call

    compiler = Compiler(wrong_at_first)
    start, xs = torch.ones(2, dtype=torch.float64), torch.arange(6.0, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            carry, sums = compiler.scan(grow, (0.5,), start, xs, 6)
    assert sum("is run step by step" in str(each.message) for each in caught) == refused
    expected, seen = start, []
    for x in xs:
        seen.append(expected.sum())
        expected = expected * 0.5 + x
    torch.testing.assert_close(carry, expected)
    torch.testing.assert_close(sums, torch.stack(seen))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_cleaning", "learned_start", "convnet_distillation"])
@pytest.mark.parametrize("keep_every", [None, 3])
def test_the_real_compiler_makes_the_same_loops(name, keep_every):
    case = problems.make(name, 0)
    made, eager = (
        hypergradient(
            case,
            OPTIMIZERS["adam"],
            bilevel.truncation.RandomWindow(5),
            backend=backend,
            keep_every=keep_every,
        )
        for backend in ("inductor", None)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", bilevel.CompileWarning)
        for seed in range(4):
            found = made(case.outer, case.outer_batch, seeded(seed))
            expected = eager(case.outer, case.outer_batch, seeded(seed))
            assert relative_error(found.grads, expected.grads) < EXACT


@pytest.mark.parametrize("solver", [None, bilevel.linear.Dense(), bilevel.linear.GMRES()])
def test_implicit_products_are_compiled(solver):
    case = problems.make("ridge", 0)
    results = [
        hypergradient(
            case,
            bilevel.optim.sgd(0.1),
            bilevel.truncation.Last(1),
            backend=backend,
            steps=200,
            estimator=Implicit(solver, batches=2),
        )(case.outer, case.outer_batch, seeded(0))
        for backend in ("eager", None)
    ]
    assert relative_error(results[0].grads, results[1].grads) < 1e-6
    assert results[0].stats.solver.status == results[1].stats.solver.status == "converged"
