"""A stretch of the inner run on its autograd graph."""

from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.inner import InnerLoop
from bilevel.iterate import Iterate, StepInputs
from bilevel.tree import tensors_in
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
            or the leaves of the pytree where the optimizer has no state.
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
            after, loss = self._inner.step_on_leaves(here, self._state, inputs)
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
            self._inner.layout.ravel([leaf.detach() for leaf in last])
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
        return self._inner.layout.ravel(point) if self._by_leaves else point[0]
