"""Steps of a run that are made as one loop: what they take of φ, stacked, and both ways through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.compiler import NotAlikeError
from bilevel.recording.inner import InnerLoop
from bilevel.recording.stacking import InputLayout, stack
from bilevel.variables import Iterate, StepInputs


@dataclass(frozen=True)
class Block:
    """Steps in a row.

    Attributes:
        start: The first one.
        stop: The one after the last.
        layout: How what a step takes of φ is put together from the next two.
        shared: Leaves that are one tensor for all steps.
        stacked: The others, each of shape [steps, …].
        own_learned: Of the others, what is learned, step by step, on the graph of φ.
        on_graph: Whether that graph is kept.
        iterates: (θ, s, g) before every step, stacked, where they are kept; g may be None.
    """

    start: int
    stop: int
    layout: InputLayout
    shared: list[Tensor]
    stacked: list[Tensor]
    own_learned: list[tuple[Tensor, ...]]
    on_graph: bool
    iterates: Any = None

    @classmethod
    def of(
        cls,
        start: int,
        inputs: Sequence[StepInputs],
        *,
        on_graph: bool,
        like: InputLayout | None = None,
    ) -> Block:
        """The block of steps that take these.

        Args:
            start: The first step.
            inputs: What each takes of φ.
            on_graph: Whether its graph is kept.
            like: What is stacked in this layout is stacked in that of the block too.

        Raises:
            NotAlikeError: They differ in more than the values of tensors.
        """
        return cls(start, start + len(inputs), *stack(inputs, like), on_graph)

    def part(self, start: int, stop: int) -> Block:
        """Some of the steps."""
        if (start, stop) == (self.start, self.stop):
            return self
        here = slice(start - self.start, stop - self.start)
        return replace(
            self,
            start=start,
            stop=stop,
            stacked=[stack[here] for stack in self.stacked],
            own_learned=[column[here] for column in self.own_learned],
            iterates=optree.tree_map(lambda stack: stack[here], self.iterates),
        )

    def inputs(self, step: int) -> StepInputs:
        """What one of the steps takes of φ, on its graph."""
        index = step - self.start
        learned = iter(self.own_learned)
        kinds = [kind for kind in self.layout.kinds if kind.is_stacked]
        own = [
            next(learned)[index] if kind.is_learned else stack[index]
            for kind, stack in zip(kinds, self.stacked, strict=True)
        ]
        inputs: StepInputs = self.layout.arrange(self.shared, own)
        return inputs

    def iterate(self, step: int) -> Iterate:
        """(θ, s) before one of the steps, where iterates are kept."""
        at: Any = optree.tree_map(lambda stack: stack[step - self.start], self.iterates)
        return Iterate(*at)

    @property
    def shared_learned(self) -> list[Tensor]:
        """What is learned of what all steps share, on the graph of φ."""
        kinds = [kind for kind in self.layout.kinds if kind.is_tensor and not kind.is_stacked]
        return list(compress(self.shared, [kind.is_learned for kind in kinds]))

    @torch.enable_grad()
    def learned(self) -> list[Tensor]:
        """All that is learned, on the graph of φ: `shared_learned`, and the others, stacked."""
        return [*self.shared_learned, *map(torch.stack, self.own_learned)]


def run_forward(
    inner: InnerLoop,
    block: Block,
    iterate: Iterate,
    *,
    signals: Callable[..., dict[str, Tensor]] | None = None,
    of_signals: tuple[Any, ...] = (),
    keep: bool,
    keep_gradients: bool = False,
) -> tuple[Iterate, Block, dict[str, Tensor]]:
    """Make the steps of a block.

    Args:
        inner: The inner loop; it compiles.
        block: The block.
        iterate: (θ, s) before it.
        signals: Further scalars of every step, of (inner, g_t, θ_{t+1}, *of_signals).
        of_signals: What these take.
        keep: Whether the iterates before every step are kept.
        keep_gradients: Whether with their gradients.

    Returns:
        (θ, s) after it, the block with its iterates, and the scalars, `inner_loss` among them,
        each of shape [steps].

    Raises:
        NotAlikeError: The optimizer's state holds something else than tensors.
    """
    carry: Any = (iterate.params, iterate.state)
    if not all(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(carry)):
        raise NotAlikeError("the optimizer's state holds something else than tensors")
    layout = block.layout.of_constants()
    fixed = (inner, layout, signals, of_signals, keep, keep_gradients, block.shared)
    (params, state), (found, kept) = inner.scan(
        _step, fixed, carry, block.stacked, block.stop - block.start
    )
    return Iterate(params, state), replace(block, iterates=kept), found


def _step(
    inner: InnerLoop,
    layout: InputLayout,
    signals: Callable[..., dict[str, Tensor]] | None,
    of_signals: tuple[Any, ...],
    keep: bool,
    keep_gradients: bool,
    shared: list[Tensor],
    carry: tuple[Tensor, Any],
    own: list[Tensor],
) -> tuple[Any, Any]:
    params, state = carry
    inputs = layout.join(shared, own)
    after_params, after_state, gradient, found = inner.advance(params, state, inputs)
    if signals is not None:
        found |= signals(inner, gradient, after_params, *of_signals)
    kept = (params, state, gradient if keep_gradients else None) if keep else None
    return (after_params, after_state), (found, kept)


def run_backward(
    inner: InnerLoop,
    block: Block,
    step_back: Callable[..., Any],
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Take λ and μ back through the steps of a block, whose iterates are kept.

    Args:
        inner: The inner loop; it compiles.
        block: The block.
        step_back: (ℓ, λ, μ, cotangents of the learned inputs) one step earlier, of (inner, θ, s,
            inputs, λ, μ).
        cotangent: λ after the block.
        state_cotangents: μ after it.

    Returns:
        λ and μ before it; ℓ and ‖λ_{t+1}‖ of every step t, each of shape [steps]; and the
        cotangents of `block.learned()`.
    """
    params, state, _ = block.iterates
    sums = [torch.zeros_like(leaf) for leaf in block.shared_learned]
    device = cotangent.device
    along: Any = (params, state, block.stacked)
    xs = optree.tree_map(lambda stack: stack.to(device).flip(0), along)
    (cotangent, state_cotangents, sums), (losses, norms, own) = inner.scan(
        _step_back,
        (inner, block.layout, step_back, block.shared),
        (cotangent, state_cotangents, sums),
        xs,
        block.stop - block.start,
    )
    own = [stack.flip(0) for stack in own]
    return cotangent, state_cotangents, losses.flip(0), norms.flip(0), [*sums, *own]


def _step_back(
    inner: InnerLoop,
    layout: InputLayout,
    step_back: Callable[..., Any],
    shared: list[Tensor],
    carry: tuple[Tensor, list[Tensor], list[Tensor]],
    x: tuple[Tensor, Any, list[Tensor]],
) -> tuple[Any, Any]:
    cotangent, state_cotangents, sums = carry
    params, state, own = x
    loss, before, state_before, of_learned = step_back(
        inner, params, state, layout.join(shared, own), cotangent, state_cotangents
    )
    of_shared, of_own = layout.split(of_learned)
    sums = [total + value for total, value in zip(sums, of_shared, strict=True)]
    return (before, state_before, sums), (loss, torch.linalg.vector_norm(cotangent), of_own)
