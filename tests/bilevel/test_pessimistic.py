"""The window that ends where the outer loss is largest, and the signal that it reads."""

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import brute_force, outer_value, relative_error, seeded, unroll

import bilevel
from bilevel.compiler import Compiler
from bilevel.truncation import Pessimistic, Plan

seeds = st.integers(0, 2**31)
#: Few values, so that ties are frequent.
losses = st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=1)


def trace(values):
    values = torch.tensor(values, dtype=torch.float64)
    return bilevel.Trace({"inner_loss": torch.zeros(len(values)), "outer_loss": values})


@given(losses, st.data())
def test_the_largest_is_chosen_and_the_later_one_of_a_tie(values, data):
    minimum = data.draw(st.integers(1, len(values)))
    schedule = Pessimistic(minimum)
    assert schedule.minimum_steps == minimum
    assert schedule.plan(len(values), seeded(0)) == Plan(len(values), signals=("outer_loss",))
    window = schedule.select(trace(values), seeded(0))
    assert window.start == 0
    assert minimum <= window.stop <= len(values)
    chosen = values[window.stop - 1]
    assert all(chosen >= value for value in values[minimum - 1 :])
    assert all(chosen > value for value in values[window.stop :])


def largest_along(case, optimizer, key, steps, minimum):
    """(every F(θ_k), d max_k F(θ_k)/dφ over k ≥ minimum) by autograd through all of them."""
    outer = optree.tree_map(lambda x: x.detach().clone().requires_grad_(), case.outer)
    values = torch.stack(
        [
            outer_value(case, unroll(case, optimizer, outer, key, 0, k)[0], outer)
            for k in range(1, steps + 1)
        ]
    )
    leaves, spec = optree.tree_flatten(outer)
    grads = torch.autograd.grad(values[minimum - 1 :].max(), leaves)
    return values.detach(), optree.tree_unflatten(spec, grads)


@settings(max_examples=20)
@given(
    st.sampled_from(["quadratic", "data_cleaning", "learned_start"]),
    st.integers(1, 9),
    st.sampled_from([0.05, 0.3]),
    st.data(),
    st.integers(0, 999),
)
def test_it_is_the_gradient_of_the_largest_outer_loss(name, steps, rate, data, seed):
    minimum = data.draw(st.integers(1, steps))
    case, optimizer = problems.make(name, seed), bilevel.optim.sgd(rate, momentum=0.9)
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, steps, Pessimistic(minimum))
    result = hypergradient(case.outer, case.outer_batch, seeded(seed))
    key = bilevel.Key.draw(seeded(seed))
    values, grads = largest_along(case, optimizer, key, steps, minimum)
    torch.testing.assert_close(result.trace["outer_loss"], values, rtol=1e-9, atol=1e-12)
    assert float(result.loss) == pytest.approx(float(values[minimum - 1 :].max()), rel=1e-9)
    assert result.window == bilevel.Window(0, minimum + int(values[minimum - 1 :].argmax()))
    assert relative_error(result.grads, grads) < 1e-8


@given(seeds)
@settings(max_examples=5)
def test_micro_batches_are_judged_together(seed):
    case = problems.make("quadratic", seed % 1000)
    pieces = [case.outer_batch, case.outer_batch + 1]
    batch = bilevel.MicroBatches(pieces, [0.3, 0.7])
    solve = bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 5, Pessimistic(2))
    whole = solve(case.outer, batch, seeded(seed)).trace["outer_loss"]
    first, second = (solve(case.outer, piece, seeded(seed)).trace["outer_loss"] for piece in pieces)
    torch.testing.assert_close(whole, 0.3 * first + 0.7 * second, rtol=1e-12, atol=0)


def test_only_the_first_replica_is_judged_along_its_run():
    case = problems.make("mlp_distillation", 0)
    judged = []
    judge = case.problem.outer_loss

    def outer_loss(params, outer, batch):
        judged.append(1)
        return judge(params, outer, batch)

    case.problem.outer_loss = outer_loss
    optimizer = bilevel.optim.sgd(0.1)
    solve = bilevel.Hypergradient(case.problem, optimizer, 7, Pessimistic(3), inner_replicas=3)
    solve(case.outer, case.outer_batch, seeded(0))
    judged.clear()
    result = solve(case.outer, case.outer_batch, seeded(0))
    assert len(judged) == 7 + 3
    assert set(result.trace) == {"inner_loss", "outer_loss"}
    keys = [bilevel.Key.draw(seeded(0))]
    keys += [keys[0].fold("replica", index) for index in (1, 2)]
    found = [brute_force(case, optimizer, key, result.window)[1] for key in keys]
    mean = optree.tree_map(lambda *grads: torch.stack(grads).mean(0), *found)
    assert relative_error(result.grads, mean) < 1e-8


def test_it_is_the_same_with_compiled_steps():
    case, results = problems.make("data_cleaning", 0), []
    for compiled in (False, True):
        solve = bilevel.Hypergradient(
            case.problem, bilevel.optim.sgd(0.3), 6, Pessimistic(2), compile=compiled
        )
        if compiled:
            solve.inner.compiler = Compiler("eager")
        results.append(solve(case.outer, case.outer_batch, seeded(0)))
    eager, traced = results
    assert traced.window == eager.window
    torch.testing.assert_close(dict(traced.trace), dict(eager.trace))
    assert relative_error(traced.grads, eager.grads) < 1e-10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_named(value):
    with pytest.raises(
        bilevel.NonFiniteError, match=rf"the outer loss became {value} at inner step 1 of 3"
    ):
        Pessimistic().select(trace([1.0, value, 2.0]), seeded(0))


def test_a_problem_without_an_outer_loss_is_refused():
    problem = bilevel.Problem.from_functions(
        init=lambda outer: torch.zeros(()),
        inner_loss=lambda params, batch: (params - batch) ** 2,
        step_loss=lambda params, outer, step: params**2,
    )
    solve = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3, Pessimistic())
    with pytest.raises(bilevel.ConfigurationError, match=r"'outer_loss': .* has no outer_loss"):
        solve(torch.tensor(1.0))


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_a_wrong_minimum_is_named(value):
    with pytest.raises(bilevel.ConfigurationError, match=r"minimum=.*at least 1"):
        Pessimistic(value)
