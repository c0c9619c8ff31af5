"""No graph outlives a call, and the adjoint's memory does not grow with the window."""

import copy
import gc
import itertools
import math
import os
import weakref

import optree
import problems
import pytest
import torch
from problems import Fixed, seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel
from bilevel.estimators import (
    Adjoint,
    Estimator,
    EvolutionStrategies,
    FiniteDifference,
    FirstOrder,
    FixedPoint,
    Forward,
    Implicit,
    LowRank,
    MoreauEnvelope,
    Penalty,
    PersistentEvolutionStrategies,
    Reverse,
    ValueFunction,
)
from bilevel.linear import Dense
from bilevel.recording.record import affordable_spacing

ESTIMATORS = [
    Reverse(),
    Adjoint(),
    Adjoint("forward"),
    Forward(),
    LowRank(guard=None),
    LowRank(guard=1e-9),
    FiniteDifference(),
    FirstOrder(),
    EvolutionStrategies(0.1, pairs=2),
    PersistentEvolutionStrategies(0.1, 100, pairs=2),
]
#: These have no gradient for a start or a rate, and say so.
IMPLICIT = [
    Implicit(Dense(), damping=1.0, batches=2),
    Implicit(damping=1.0, warm_start=True),
    FixedPoint(Dense()),
    Penalty(steps=3),
    ValueFunction(steps=3),
    MoreauEnvelope(steps=3),
]
ADAM = bilevel.optim.adam(1e-2)


class Recording(Estimator):
    """Hands the trajectory on, and keeps its iterates and its trace."""

    def __init__(self, estimator):
        self.estimator = estimator
        self.uses_graph = estimator.uses_graph
        self.uses_inner_gradients = estimator.uses_inner_gradients

    def __call__(self, trajectory, outer_batch):
        self.kept, self.trace = trajectory.kept, trajectory.trace
        return self.estimator(trajectory, outer_batch)


def tensors_with_a_graph():
    """Every live tensor that is part of a graph and is no leaf, found through the collector."""
    return [
        value
        for value in gc.get_objects()
        if issubclass(type(value), Tensor) and value.grad_fn is not None
    ]


@pytest.fixture(scope="module")
def _used_before():
    """PyTorch's first use of a transform in a process leaves things behind, once."""
    for estimator in copy.deepcopy(ESTIMATORS + IMPLICIT):
        case = problems.make("quadratic", 0)
        optimizer = case.optimizer(bilevel.optim.adam, 1e-2)
        made = bilevel.Hypergradient(case.problem, optimizer, 4, None, estimator)
        made(case.outer, case.outer_batch, seeded(0))


@pytest.mark.usefixtures("_used_before")
@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        *itertools.product(["quadratic"], ESTIMATORS + IMPLICIT),
        *itertools.product(["learned_rate"], ESTIMATORS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *itertools.product(["data_cleaning"], ESTIMATORS + IMPLICIT),
                *itertools.product(["learned_start"], ESTIMATORS),
            )
        ),
    ],
)
def test_no_graph_outlives_a_call(name, estimator):
    case, estimator = problems.make(name, 0), copy.deepcopy(estimator)  # some have a state
    # Outer variables with a graph of their own, whose every tensor is known.
    outer = optree.tree_map(lambda leaf: leaf.clone().requires_grad_() * 1.0, case.outer)
    recording = Recording(estimator)
    hypergradient = bilevel.Hypergradient(
        case.problem, case.optimizer(bilevel.optim.adam, 1e-2), 4, None, recording
    )
    gc.collect()
    before = {id(tensor) for tensor in tensors_with_a_graph()}
    gc.disable()  # a cycle that holds a graph until the next collection would be a leak as well
    try:
        result = hypergradient(outer, case.outer_batch, seeded(0))
        survivors = [tensor for tensor in tensors_with_a_graph() if id(tensor) not in before]
    finally:
        gc.enable()
    assert not survivors
    kept = [(iterate.params, iterate.state) for iterate in recording.kept.values()]
    trace = dict(recording.trace)
    stats = [value for value in vars(result.stats).values() if isinstance(value, Tensor)]
    stats += list(estimator.state_dict().values())
    held = [kept, trace, result.loss, result.grads, result.params, result.metrics, stats]
    tensors = [leaf for leaf in optree.tree_leaves(held) if isinstance(leaf, Tensor)]
    assert len(tensors) > 10
    assert not any(tensor.requires_grad for tensor in tensors)


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes held by tensors made under it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        written = {id(leaf) for leaf in optree.tree_leaves((args, kwargs or {}))}
        for leaf in optree.tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in written and not leaf._is_view():
                size = leaf.numel() * leaf.element_size()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(leaf, self._free, size)
        return result

    def _free(self, size):
        self.now -= size


def peak(estimator, width, **keep):
    """Bytes above the recorded run while the window is differentiated."""
    case = problems.make("convnet_distillation", 0)

    class Measured(Estimator):
        def __call__(self, *args):
            with LiveBytes() as self.memory:
                return estimator(*args)

    measured = Measured()
    bilevel.Hypergradient(
        case.problem, ADAM, 24, Fixed(24 - width, 24), measured, graph_budget=0, **keep
    )(case.outer, case.outer_batch, seeded(0))
    return measured.memory.peak


@pytest.mark.parametrize("hvp", ["reverse", "forward"])
def test_the_adjoint_needs_one_step_of_graph_whatever_the_window(hvp):
    assert peak(Adjoint(hvp), 24) < 1.02 * peak(Adjoint(hvp), 3)


def test_plain_reverse_needs_a_graph_for_every_step():
    assert peak(Reverse(), 24) > 5 * peak(Reverse(), 3)


def test_fewer_kept_iterates_are_recomputed_a_segment_at_a_time():
    """With every k-th kept, at most k − 1 more iterates (θ and Adam's two averages) are live."""
    case = problems.make("convnet_distillation", 0)
    params = case.problem.init(case.outer, generator=seeded(0))
    iterate = 3 * 8 * sum(leaf.numel() for leaf in params.values())
    assert peak(Adjoint(), 24, keep_every=6) < 1.02 * (peak(Adjoint(), 24) + 6 * iterate)


@pytest.mark.parametrize(("every", "count"), [(1, 11), (2, 6), (3, 5), (5, 3), (50, 2)])
def test_how_many_iterates_are_kept(every, count):
    """Of θ_4 … θ_14: every k-th from the earliest start, and the last."""
    case = problems.make("quadratic", 0)
    recording = Recording(Adjoint())
    bilevel.Hypergradient(
        case.problem,
        ADAM,
        14,
        bilevel.truncation.Last(10),
        recording,
        keep_every=every,
        graph_budget=0,
    )(case.outer, case.outer_batch)
    assert len(recording.kept) == count
    assert min(recording.kept) == 4


def iterate(device):
    """11 million parameters under Adam: 132 MB, and 300 of them 40 GB."""
    params = torch.empty(11_000_000, device=device)
    return bilevel.Iterate(params, (params, params))


def test_what_an_accelerator_keeps_on_the_host_may_take_more_of_it():
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    spacing = affordable_spacing(iterate("meta"), 300, torch.device("cpu"))
    taken = [(math.ceil(300 / k) + (k if k > 1 else 0)) * 132e6 for k in range(1, 19)]
    affordable = [k for k, size in enumerate(taken, start=1) if size <= host / 4]
    assert spacing == min([*affordable, 18])
    # On a CPU the host's memory is where it is.
    assert affordable_spacing(iterate("cpu"), 300, torch.device("cpu")) == 18


def test_where_the_hosts_memory_is_not_known_as_little_is_kept_there_as_on_the_device(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert affordable_spacing(iterate("meta"), 300, torch.device("cpu")) == 18
