"""MTT and ATT: the hypergradient is that of autograd through the selected steps, in float64."""

import weakref
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel
from bilevel.truncation import Full, MinimumDistance, Truncation
from dd.augmentation import DSA, NoAugmentation
from dd.networks import ConvNet
from dd.objectives.match_experts import TrajectoryMatching, learned_rate
from dd.synthetic.dataset import SyntheticDataset

Outer = dict[str, Tensor]

CLASSES, RATE = 3, 0.05
seeds = st.integers(0, 2**31)


def network() -> nn.Module:
    return ConvNet(CLASSES, 2, image_size=8, depth=1, width=3).double()


def matching(
    seed: int, learn_labels: bool, expert_steps: int, augment: bool = True
) -> tuple[TrajectoryMatching, Outer]:
    """A problem with mini-batches, and outer variables with a stretch of an expert's trajectory."""
    generator = seeded(seed)
    net = network()
    params = bilevel.fresh_parameters(net, generator)
    start = flat(params)
    images = torch.randn(12, 2, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % CLASSES
    for _ in range(expert_steps):
        params = descended(net, params, images, labels, torch.tensor(0.3))
    synthetic = SyntheticDataset(
        2, start="real", learn_labels=learn_labels, classes_per_step=2, batch_per_class=1
    )
    outer = synthetic.create(images, labels, CLASSES, generator)
    # Off the starting value, where the derivative of the rate is not just 1.
    outer |= {"rate": torch.tensor(0.02, dtype=torch.float64)}
    outer |= {"start": start, "target": flat(params).detach()}
    outer = {name: value.detach().requires_grad_() for name, value in outer.items()}
    problem = TrajectoryMatching(net, synthetic, DSA() if augment else NoAugmentation(), RATE)
    return problem, outer


def flat(params: Outer) -> Tensor:
    return torch.cat([params[name].flatten() for name, _ in network().named_parameters()])


def descended(net: nn.Module, params: Outer, images: Tensor, labels: Tensor, rate: Tensor) -> Outer:
    """One step of gradient descent, with a graph."""
    params = {name: p if p.requires_grad else p.requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(functional_call(net, params, (images,)), labels)
    gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return {
        name: value - rate * gradient
        for (name, value), gradient in zip(params.items(), gradients, strict=True)
    }


def brute_force(
    problem: TrajectoryMatching, outer: Outer, steps: int, seed: int, schedule: Truncation
) -> tuple[int, Tensor, list[Tensor]]:
    """(N, F, dF/dφ) with the graph of all steps, as the released code has it."""
    key = bilevel.Key.draw(seeded(seed))
    sizes = [parameter.numel() for parameter in problem.network.parameters()]
    params = {
        name: part.view(parameter.shape)
        for (name, parameter), part in zip(
            problem.network.named_parameters(), outer["start"].split(sizes), strict=True
        )
    }
    rate = RATE * torch.exp(outer["rate"] / RATE)
    iterates = []
    for step in range(steps):
        generator = key.generator("inner_batch", step)
        images, labels = problem.synthetic.batch(outer, generator)
        images = problem.augmentation(images, generator)
        params = descended(problem.network, params, images, labels, rate)
        iterates.append(flat(params))
    best = steps - 1
    if isinstance(schedule, MinimumDistance):
        power = {"l1": 1, "squared_l2": 2}[schedule.distance]
        nearest = float("inf")
        for index, iterate in enumerate(iterates):
            distance = float(((iterate - outer["target"]).detach().abs() ** power).sum())
            if index + 1 >= schedule.minimum and distance <= nearest:
                best, nearest = index, distance
    distance = ((iterates[best] - outer["target"]) ** 2).sum()
    loss = distance / ((outer["start"] - outer["target"]) ** 2).sum()
    gradients = torch.autograd.grad(loss, list(outer.values()))
    return best + 1, loss.detach(), list(gradients)


def solve(
    problem: TrajectoryMatching,
    outer: Outer,
    steps: int,
    seed: int,
    schedule: Truncation,
    graph_budget: int | None = None,
) -> bilevel.HypergradientResult:
    hypergradient = bilevel.Hypergradient(
        problem, bilevel.optim.sgd, steps, schedule, graph_budget=graph_budget
    )
    return hypergradient(outer, None, seeded(seed))


@st.composite
def schedules(draw: Any) -> tuple[int, Truncation]:
    """N_S with MTT or ATT."""
    steps = draw(st.integers(1, 7))
    distance = draw(st.sampled_from(["full", "l1", "squared_l2"]))
    if distance == "full":
        return steps, Full()
    return steps, MinimumDistance(distance, draw(st.integers(1, steps)))


@settings(max_examples=40)
@given(schedules(), st.integers(1, 3), st.booleans(), seeds)
def test_the_hypergradient_is_autograd_through_the_selected_steps(
    schedule: tuple[int, Truncation], expert_steps: int, learn_labels: bool, seed: int
) -> None:
    steps, truncation = schedule
    problem, outer = matching(seed % 100, learn_labels, expert_steps)
    result = solve(problem, outer, steps, seed, truncation)
    stop, loss, gradients = brute_force(problem, outer, steps, seed, truncation)
    assert (result.window.start, result.window.stop) == (0, stop)
    torch.testing.assert_close(result.loss, loss, rtol=1e-10, atol=0.0)
    for (name, found), expected in zip(result.grads.items(), gradients, strict=True):
        error = float((found - expected).norm())
        assert error <= 1e-9 * float(expected.norm()) + 1e-15, name


@given(st.integers(1, 6), st.sampled_from(["l1", "squared_l2"]), seeds)
@settings(max_examples=10)
def test_of_tied_steps_the_later_is_differentiated(steps: int, distance: Any, seed: int) -> None:
    """With soft labels of zero all inner gradients vanish, though not what φ does to them."""
    problem, outer = matching(seed % 100, True, 1)
    outer["labels"] = torch.zeros_like(outer["labels"]).requires_grad_()
    truncation = MinimumDistance(distance)
    result = solve(problem, outer, steps, seed, truncation)
    assert len(result.trace[f"{distance}_distance"].unique()) == 1
    stop, _, gradients = brute_force(problem, outer, steps, seed, truncation)
    assert result.window.stop == stop == steps
    assert float(result.grads["labels"].abs().max()) > 1e-6
    for found, expected in zip(result.grads.values(), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@given(st.floats(-1, 1), st.floats(1e-4, 1e-1))
def test_the_learned_rate_is_positive_and_its_variable_moves_it_one_to_one(
    value: float, start: float
) -> None:
    variable = torch.tensor(value * 20 * start, dtype=torch.float64)
    assert float(learned_rate(variable, start)) > 0
    at_start = torch.zeros((), dtype=torch.float64, requires_grad=True)
    learned_rate(at_start, start).backward()  # type: ignore[no-untyped-call]
    assert float(learned_rate(at_start.detach(), start)) == pytest.approx(start)
    assert at_start.grad is not None
    assert float(at_start.grad) == pytest.approx(1.0)


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes held by tensors made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        written = {id(leaf) for leaf in optree.tree_leaves((args, kwargs or {}))}
        for leaf in optree.tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in written and not leaf._is_view():
                size = leaf.numel() * leaf.element_size()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(leaf, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def peak(steps: int, *, unrolled: bool) -> int:
    """Live bytes of one ATT hypergradient, forward and backward, beyond the kept iterates."""
    problem, outer = matching(0, learn_labels=False, expert_steps=1)
    with LiveBytes() as memory:
        if unrolled:
            brute_force(problem, outer, steps, 0, MinimumDistance())
        else:
            solve(problem, outer, steps, 0, MinimumDistance(minimum=steps), graph_budget=0)
    return memory.peak - steps * outer["start"].numel() * 8


def test_memory_does_not_grow_with_the_graph_of_the_inner_steps() -> None:
    assert peak(24, unrolled=False) < 1.1 * peak(4, unrolled=False)
    assert peak(24, unrolled=True) > 4 * peak(4, unrolled=True)
