"""Steps of a run that are made as one loop: what they take of φ, stacked, and both ways through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from bilevel.inner import InnerLoop
from bilevel.iterate import Iterate, StepInputs
from bilevel.tree import needs_gradient, tensors_in

#: So many bytes are stacked at once: little enough for the allocator to use the same memory again.
BLOCK_BYTES = 16 * 2**20


class NotAlikeError(Exception):
    """Why steps cannot be made as one loop: a sentence."""


class Kind(NamedTuple):
    """What a leaf of the inputs is in every step.

    Attributes:
        constant: Its value, where it is no tensor.
        is_tensor: Whether it is one.
        is_stacked: Whether it is another one in every step.
        is_learned: Whether its derivative is asked for.
    """

    constant: Any
    is_tensor: bool
    is_stacked: bool
    is_learned: bool


@dataclass(frozen=True)
class InputLayout:
    """How a step's inputs are put together from what all steps share and what is its own."""

    spec: optree.PyTreeSpec
    kinds: tuple[Kind, ...]

    def join(self, shared: Sequence[Tensor], own: Sequence[Tensor]) -> StepInputs:
        """The inputs; what is learned are leaves of a graph."""
        from_shared, from_own = iter(shared), iter(own)
        leaves = []
        for kind in self.kinds:
            leaf = kind.constant
            if kind.is_tensor:
                leaf = next(from_own if kind.is_stacked else from_shared).detach()
            leaves.append(leaf.requires_grad_() if kind.is_learned else leaf)
        inputs: Any = optree.tree_unflatten(self.spec, leaves)
        return inputs

    def of_constants(self) -> InputLayout:
        """The same with nothing learned."""
        kinds = (kind._replace(is_learned=False) for kind in self.kinds)
        return InputLayout(self.spec, tuple(kinds))

    def split(self, of_learned: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """One value for each learned leaf, as (those of shared ones, those of stacked ones)."""
        learned = [kind for kind in self.kinds if kind.is_learned]
        pairs = list(zip(learned, of_learned, strict=True))
        return (
            [value for kind, value in pairs if not kind.is_stacked],
            [value for kind, value in pairs if kind.is_stacked],
        )


@dataclass(frozen=True)
class Block:
    """Steps in a row.

    Attributes:
        start: The first one.
        inputs: What each takes of φ, on its graph where that is kept.
        layout: How that is put together from the next two.
        shared: Leaves that are one tensor for all steps.
        stacked: The others, each of shape [steps, …].
        iterates: (θ, s, g) before every step, stacked, where they are kept; g may be None.
    """

    start: int
    inputs: tuple[StepInputs, ...]
    layout: InputLayout
    shared: list[Tensor]
    stacked: list[Tensor]
    iterates: Any = None

    @classmethod
    def of(cls, start: int, inputs: Sequence[StepInputs], like: InputLayout | None = None) -> Block:
        """The block of these steps; what is stacked in another layout is stacked in this one too.

        Raises:
            NotAlikeError: They differ in more than the values of tensors.
        """
        flat: list[tuple[list[Any], Any]] = [
            optree.tree_flatten(each)  # type: ignore[arg-type]
            for each in inputs
        ]
        spec = flat[0][1]
        if any(other != spec for _, other in flat):
            raise NotAlikeError("the inputs of two steps have another structure")
        columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
        before = like.kinds if like is not None and like.spec == spec else (None,) * len(columns)
        kinds, shared, stacked = [], [], []
        for column, known in zip(columns, before, strict=True):
            kind = _kind(column)
            if known is not None and known.is_stacked and isinstance(column[0], Tensor | float):
                kind = Kind(None, True, True, kind.is_learned)
            kinds.append(kind)
            if kind.is_stacked:
                stacked.append(torch.stack([_as_tensor(leaf) for leaf in column]))
            elif kind.is_tensor:
                shared.append(column[0].detach())
        return cls(start, tuple(inputs), InputLayout(spec, tuple(kinds)), shared, stacked)

    @property
    def stop(self) -> int:
        """The step after the last one."""
        return self.start + len(self.inputs)

    def part(self, start: int, stop: int) -> Block:
        """Some of the steps."""
        if (start, stop) == (self.start, self.stop):
            return self
        here = slice(start - self.start, stop - self.start)
        return replace(
            self,
            start=start,
            inputs=self.inputs[here],
            stacked=[stack[here] for stack in self.stacked],
            iterates=optree.tree_map(lambda stack: stack[here], self.iterates),
        )

    def iterate(self, step: int) -> Iterate:
        """(θ, s) before one of the steps, where iterates are kept."""
        at: Any = optree.tree_map(lambda stack: stack[step - self.start], self.iterates)
        return Iterate(*at)

    def learned(self) -> tuple[list[Tensor], list[Tensor]]:
        """(the learned leaves that steps share, the others step by step), on the graph of φ."""
        by_step = [self._learned_of(inputs) for inputs in self.inputs]
        return self.layout.split(by_step[0])[0], [
            leaf for leaves in by_step for leaf in self.layout.split(leaves)[1]
        ]

    def _learned_of(self, inputs: StepInputs) -> list[Any]:
        leaves: list[Any] = optree.tree_leaves(inputs)  # type: ignore[arg-type]
        return [
            leaf for leaf, kind in zip(leaves, self.layout.kinds, strict=True) if kind.is_learned
        ]


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
        _step, fixed, carry, block.stacked, len(block.inputs)
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
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
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
        cotangents of `block.learned()`: the sums for what steps share, and those of the others.
    """
    params, state, _ = block.iterates
    sums = [torch.zeros_like(leaf) for leaf in block.learned()[0]]
    device = cotangent.device
    along: Any = (params, state, block.stacked)
    xs = optree.tree_map(lambda stack: stack.to(device).flip(0), along)
    (cotangent, state_cotangents, sums), (losses, norms, own) = inner.scan(
        _step_back,
        (inner, block.layout, step_back, block.shared),
        (cotangent, state_cotangents, sums),
        xs,
        len(block.inputs),
    )
    by_step = zip(*(stack.flip(0).unbind() for stack in own), strict=True)
    each = [value for values in by_step for value in values]
    return cotangent, state_cotangents, losses.flip(0), norms.flip(0), sums, each


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


def varying_bytes(inputs: StepInputs, first: StepInputs) -> int:
    """Bytes of what of a step's inputs is not the very memory of another step's."""
    leaves, others = tensors_in(inputs), tensors_in(first)
    if len(leaves) != len(others):
        return sum(leaf.nbytes for leaf in leaves)
    return sum(
        leaf.nbytes
        for leaf, other in zip(leaves, others, strict=True)
        if leaf is not other and not _is_same_memory(leaf, other)
    )


def _kind(column: Sequence[Any]) -> Kind:
    first = column[0]
    if not isinstance(first, Tensor):
        if all(leaf is first or _is_equal(leaf, first) for leaf in column):
            return Kind(first, False, False, False)
        if all(isinstance(leaf, float) for leaf in column):
            return Kind(None, True, True, False)
        raise NotAlikeError(f"the inputs of two steps differ in a constant, {first!r} in the first")
    if not all(isinstance(leaf, Tensor) for leaf in column):
        raise NotAlikeError("a tensor among the inputs of one step is none in another's")
    learned = any(map(needs_gradient, column))
    if all(leaf is first or _is_same_memory(leaf, first) for leaf in column):
        return Kind(None, True, False, learned)
    if any(leaf.shape != first.shape or leaf.dtype != first.dtype for leaf in column):
        raise NotAlikeError("the inputs of two steps have other shapes or dtypes")
    if first.layout is not torch.strided:
        raise NotAlikeError("sparse inputs differ from step to step")
    return Kind(None, True, True, learned)


def _as_tensor(leaf: Any) -> Tensor:
    return leaf.detach() if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64)


def _is_equal(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors without a graph are views of the same numbers."""
    return (
        not (one.requires_grad or other.requires_grad)
        and one.layout is torch.strided is other.layout
        and one.numel() > 0
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
