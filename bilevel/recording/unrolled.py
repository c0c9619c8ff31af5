"""A stretch of the inner run on its autograd graph, and how much of that is kept."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.contract.graph import saved_storages
from bilevel.recording.inner import InnerLoop
from bilevel.tree import tensors_in
from bilevel.variables import Iterate, StepInputs
from bilevel.window import Window


@final
class Unrolled:
    """Inner steps as plain autograd records them, from θ_start on.

    Args:
        inner: The inner loop.
        iterate: (θ_start, s_start), with or without a graph.
        start: The number of its step.

    Attributes:
        start: That number.
        points: θ_start and every iterate after it, each as tensors on the graph: one flat vector,
            or the leaves of the pytree where the optimizer begins without a state.
    """

    @torch.enable_grad()
    def __init__(self, inner: InnerLoop, iterate: Iterate, start: int) -> None:
        self.start = start
        self._inner, self._state = inner, iterate.state
        self._by_leaves = not tensors_in(iterate.state)
        leaves = (
            optree.tree_leaves(inner.unravel(iterate.params))
            if self._by_leaves
            else [iterate.params]
        )
        # An inner gradient can be taken for what is on a graph already, or begins one.
        begun = [x if x.requires_grad else x.detach().requires_grad_() for x in leaves]
        self.points: list[list[Tensor]] = [begun]

    @torch.enable_grad()
    def step(self, inputs: StepInputs) -> Tensor:
        """Make one step; returns ℓ before it, without a graph."""
        here = self.points[-1]
        if self._by_leaves:
            after, self._state, loss = self._inner.step_on_leaves(here, self._state, inputs)
        else:
            gradient, loss = self._inner.gradient_with_graph(here[0], inputs.batch)
            iterate = Iterate(here[0], self._state)
            moved = self._inner.update(iterate, gradient, inputs.hyperparameters)
            after, self._state = [moved.params], moved.state
        self.points.append(after)
        return loss.detach()

    @property
    def window(self) -> Window:
        """The steps that were made, at least one."""
        return Window(self.start, self.start + len(self.points) - 1)

    @property
    def end(self) -> Any:
        """(θ, s) after the last step, on the graph."""
        return self.points[-1], self._state

    def iterate(self) -> Iterate:
        """(θ, s) after the last step, flat and without a graph."""
        last = self.points[-1]
        params = (
            self._inner.layout.join([leaf.detach() for leaf in last])
            if self._by_leaves
            else last[0]
        )
        return Iterate(params, self._state).detached()

    def like(self, params: Tensor) -> list[Tensor]:
        """A flat vector as tensors of the shapes of each point's."""
        return optree.tree_leaves(self._inner.unravel(params)) if self._by_leaves else [params]

    def flat(self, index: int) -> Tensor:
        """The point at `index` as one vector on the graph."""
        point = self.points[index]
        return self._inner.layout.join(point) if self._by_leaves else point[0]


@final
@dataclass
class GraphBudget:
    """How many bytes of autograd graph a recording may keep, and what one step's graph takes.

    What a step takes is measured once for each combination of shapes, on two steps that follow each
    other, and remembered. So what is kept depends on shapes and settings alone, never on the load
    of the machine: a run that is resumed goes the same way.

    Attributes:
        bytes: The most that may be kept; None: 256 MiB on a CPU, 1/64 of an accelerator's memory.
    """

    bytes: int | None = None
    _measured: dict[Hashable, int] = field(default_factory=dict)

    def limit(self, device: torch.device) -> int:
        """The budget in bytes for a run on `device`."""
        if self.bytes is not None:
            return self.bytes
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 64
        return 256 * 2**20

    def size(self, kind: str, signature: Hashable, count: int) -> int:
        """What `count` graphs of a kind that was measured take, in bytes."""
        return count * self._measured[kind, signature]

    def fits(self, kind: str, signature: Hashable, count: int, device: torch.device) -> bool | None:
        """Whether `count` graphs of this kind fit; None where one has not been measured yet."""
        if self.bytes == 0:
            return False
        measured = self._measured.get((kind, signature))
        return None if measured is None else count * measured <= self.limit(device)

    def measure(
        self,
        kind: str,
        signature: Hashable,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        more: int = 0,
    ) -> None:
        """Remember what the graph of `after` keeps beyond that of the step before, and `more`."""
        shared = saved_storages(before)
        self._measured[kind, signature] = more + sum(
            size for at, size in saved_storages(after).items() if at not in shared
        )


@final
class KeptGraphs:
    """Whether the graphs of `count` steps are kept; open until two steps in a row were seen."""

    def __init__(self, budget: GraphBudget, kind: str, count: int) -> None:
        self._budget, self._kind, self.count = budget, kind, count
        self._before: list[Tensor] | None = None
        self._decided: bool | None = None
        self.refusal = ""
        if budget.bytes == 0:
            self.refuse("graph_budget=0")
        elif count == 0:
            self._decided = False
        elif count == 1:  # The graph of one step is there in any case.
            self._decided = True

    def refuse(self, reason: str) -> None:
        """Keep none, for a reason."""
        self._decided, self.refusal = False, reason

    @property
    def wanted(self) -> bool:
        """Whether the next step's graph is to be made and held."""
        return self._decided is not False

    def see(self, iterate: Iterate, inputs: StepInputs, made: Any) -> None:
        """Decide, by what one step after another makes with its graph, if it is not decided."""
        if self._decided is not None:
            self._before = None
            return
        signature = self._look_up(iterate, inputs)
        if self._decided is None and self._before is not None:
            self._measure(signature, self._before, tensors_in(made), iterate)
        self._before = tensors_in(made) if self._decided is None else None

    def probe(self, inner: InnerLoop, iterate: Iterate, inputs: StepInputs) -> None:
        """Decide by two steps that are made for this alone, if it is not decided.

        The run's own first steps will not do: were their graphs then let go, these steps would have
        been made in other operations than in a later run, and differ in the last bits.
        """
        signature = self._look_up(iterate, inputs)
        if self._decided is None:
            tried = Unrolled(inner, iterate, 0)
            tried.step(inputs)
            before = tensors_in(tried.end)
            tried.step(inputs)
            dense = (x for x in tensors_in(inputs) if x.layout is torch.strided)
            shared = sum(tensor.nbytes for tensor in dense)
            self._measure(signature, before, tensors_in(tried.end), iterate, shared)

    def _look_up(self, iterate: Iterate, inputs: StepInputs) -> Hashable:
        leaves = tensors_in((iterate.params, iterate.state, inputs))
        signature = tuple((x.shape, x.dtype) for x in leaves)
        if self._decided is None:
            self._decide(signature, iterate.params.device)
        return signature

    def _measure(
        self,
        signature: Hashable,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        iterate: Iterate,
        more: int = 0,
    ) -> None:
        self._budget.measure(self._kind, signature, before, after, more)
        self._decide(signature, iterate.params.device)

    def _decide(self, signature: Hashable, device: torch.device) -> None:
        self._decided = self._budget.fits(self._kind, signature, self.count, device)
        if self._decided is False:
            size = self._budget.size(self._kind, signature, self.count)
            limit = self._budget.limit(device)
            self.refuse(
                f"the graph of {self.count} steps would take {size / 2**20:.3g} MiB, more than "
                f"graph_budget={limit / 2**20:.3g} MiB"
            )
