"""What holds between two processes; `test_distributed.py` runs this file in both, in step."""

import os
from datetime import timedelta

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import flat, randn, relative_error, seeded
from torch import distributed

import bilevel
from bilevel.distributed import AveragedHypergradient, average, broadcast_, gather, rank

#: Both processes must draw the same examples.
in_step = settings(derandomize=True, database=None, deadline=None, max_examples=10)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", autouse=True)
def _group():
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield
    distributed.destroy_process_group()


def hypergradient(problem, truncation=None, optimizer=None):
    return bilevel.Hypergradient(
        problem, optimizer or bilevel.optim.sgd(0.05, momentum=0.5), 5, truncation
    )


@in_step
@given(st.sampled_from(sorted(problems.PROBLEMS)), st.integers(1, 5), seeds, seeds, seeds)
def test_the_result_is_the_mean_of_what_one_process_computes_with_both_seeds(
    name, window, seed, first, second
):
    case = problems.make(name, seed % 1000)
    truncation = bilevel.truncation.RandomWindow(window)
    plain = hypergradient(case.problem, truncation, case.optimizer(bilevel.optim.sgd, 0.05))
    generators = first, second
    one, two = (plain(case.outer, case.outer_batch, seeded(each)) for each in generators)
    averaged = AveragedHypergradient(plain)
    both = averaged(case.outer, case.outer_batch, seeded(generators[rank()]))

    mean = (flat(one.grads) + flat(two.grads)) / 2
    assert optree.tree_structure(both.grads) == optree.tree_structure(case.outer)
    assert relative_error(both.grads, mean) < 1e-14
    assert float(both.loss) == pytest.approx((float(one.loss) + float(two.loss)) / 2, rel=1e-14)
    assert float(both.stats.hypergradient_norm) == pytest.approx(float(mean.norm()), rel=1e-12)
    assert set(both.metrics) == set(one.metrics)
    for key, value in both.metrics.items():
        assert float(value) == pytest.approx(float(one.metrics[key] + two.metrics[key]) / 2)
    own = (one, two)[rank()]
    assert both.window == own.window
    assert torch.equal(flat(both.params), flat(own.params))


@in_step
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=6,
    ),
    seeds,
)
def test_average_of_any_tensors(kinds, seed):
    def tensors(process):
        generator = seeded(seed + process)
        return [torch.randn(shape, generator=generator).to(dtype) for dtype, shape in kinds]

    given_here = tensors(rank())
    averaged = average(given_here)
    for found, here, one, two in zip(averaged, given_here, tensors(0), tensors(1), strict=True):
        assert torch.equal(found, (one + two) / 2)
        assert found.dtype == one.dtype
        assert torch.equal(here, (one, two)[rank()])


def test_there_is_one_message_for_each_dtype(monkeypatch):
    sent, send = [], distributed.all_reduce

    def all_reduce(flat, **how):
        sent.append(flat)
        return send(flat, **how)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    average([torch.ones(2), torch.ones(3, 4).double(), torch.ones(()), torch.ones(5)])
    assert [(flat.dtype, flat.numel()) for flat in sent] == [
        (torch.float32, 8),
        (torch.float64, 12),
    ]


def test_outer_steps_leave_the_same_bits_everywhere():
    case = problems.make("mlp_distillation", 0)
    outer = {name: value.float().requires_grad_() for name, value in case.outer.items()}
    with torch.no_grad():
        outer["images"] += rank()
    broadcast_(outer.values())
    assert torch.equal(outer["images"], case.outer["images"].float())
    averaged = AveragedHypergradient(hypergradient(case.problem))
    optimizer, clip = torch.optim.Adam(outer.values(), lr=0.1), bilevel.clip.MovingAverageClip()
    for step in range(4):
        optimizer.zero_grad()
        # Added to what is there already, as autograd would.
        outer["labels"].grad = torch.ones_like(outer["labels"])
        generator = bilevel.Key(0).fold(rank()).generator(step)
        images, labels = case.outer_batch
        result = averaged.backward(outer, (images, labels), generator)
        torch.testing.assert_close(outer["images"].grad, result.grads["images"])
        torch.testing.assert_close(outer["labels"].grad, 1 + result.grads["labels"])
        clip(outer.values())
        optimizer.step()
    first, second = gather([flat(outer).tolist(), clip.average])
    assert first == second
    assert not torch.allclose(outer["images"], case.outer["images"].float())


class Fragile(problems.Ridge):
    """Ridge regression whose outer loss is what the test says."""

    loss = None

    def outer_loss(self, params, outer, batch):
        return self.loss(params) if self.loss else super().outer_loss(params, outer, batch)


def fragile():
    case = problems.make("ridge", 0)
    problem = Fragile(case.problem.inputs, case.problem.targets)
    averaged = AveragedHypergradient(hypergradient(problem))
    return problem, lambda: averaged(case.outer, case.outer_batch, seeded(rank()))


def test_what_is_not_finite_in_one_process_is_skipped_in_all():
    problem, call = fragile()
    before = flat(call().grads)
    if rank() == 1:
        problem.loss = lambda params: params.sum() * torch.nan
    message = "the outer loss is nan" if rank() else "process 1 of 2: .* the outer loss is nan"
    with pytest.raises(bilevel.NonFiniteError, match=message):
        call()
    problem.loss = None
    assert torch.equal(flat(call().grads), before)


def test_an_error_in_one_process_is_an_error_in_all():
    problem, call = fragile()

    def broken(params):
        raise KeyError("mine")

    if rank() == 1:
        problem.loss = broken
    expected, message = (
        (KeyError, "mine") if rank() else (bilevel.ProcessError, "process 1 of 2: KeyError: 'mine'")
    )
    with pytest.raises(expected, match=message):
        call()


def test_an_error_that_cannot_be_skipped_outweighs_one_that_can():
    """A process that is going to end must not be waited for in the next outer step."""
    reports = [
        bilevel.distributed._Report(error="skip me", skippable=True),
        bilevel.distributed._Report(error="not me"),
    ]
    with pytest.raises(bilevel.ProcessError, match="process 1 of 2: not me"):
        bilevel.distributed._check(reports)


@pytest.mark.parametrize("other", ["metrics", "shape"])
def test_processes_that_do_different_things_are_found_out(other):
    problem, call = fragile()
    if rank() == 1 and other == "metrics":
        problem.loss = lambda params: (params.sum(), {"extra": params.sum()})
    if other == "shape":
        case = problems.make("quadratic", 0)
        size = 3 + rank()
        case.problem.B = randn(4, size, generator=seeded(0))
        outer = {"phi": randn(size, generator=seeded(0))}
        averaged = AveragedHypergradient(hypergradient(case.problem))
        call = lambda: averaged(outer, case.outer_batch)  # noqa: E731
    with pytest.raises(bilevel.ProcessError, match="process 1 has other metrics or outer variab"):
        call()


def test_gather_is_in_the_order_of_ranks():
    assert gather({"rank": rank()}) == [{"rank": 0}, {"rank": 1}]


def test_a_process_that_is_gone_is_an_error_in_the_others():
    """Comes last, for afterwards there is no second process."""
    if rank() == 1:
        os._exit(0)
    for call in (lambda: gather(0), lambda: average([torch.ones(3)])):
        with pytest.raises(bilevel.ProcessError, match="process 0 of 2 cannot reach another one"):
            call()
