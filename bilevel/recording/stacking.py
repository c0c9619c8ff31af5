"""What several steps take of φ as stacked tensors, and how to put one step's together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from bilevel.compiler import NotAlikeError
from bilevel.tree import needs_gradient, tensors_in
from bilevel.variables import StepInputs

#: So many bytes are stacked at once: few enough to be in the cache still when they are read.
BLOCK_BYTES = 4 * 2**20


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
        """The inputs; what is learned are new leaves of a graph."""
        inputs = self.arrange([leaf.detach() for leaf in shared], [leaf.detach() for leaf in own])
        for leaf, kind in zip(optree.tree_leaves(inputs), self.kinds, strict=True):
            if kind.is_learned:
                leaf.requires_grad_()
        return inputs

    def arrange(self, shared: Sequence[Tensor], own: Sequence[Tensor]) -> Any:
        """The inputs, of these very tensors."""
        from_shared, from_own = iter(shared), iter(own)
        leaves = [
            kind.constant
            if not kind.is_tensor
            else next(from_own if kind.is_stacked else from_shared)
            for kind in self.kinds
        ]
        return optree.tree_unflatten(self.spec, leaves)

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


def stack(
    inputs: Sequence[StepInputs], like: InputLayout | None = None
) -> tuple[InputLayout, list[Tensor], list[Tensor], list[tuple[Tensor, ...]]]:
    """(how to put them together again, what all steps share, what they do not, stacked, and of
    that what is learned, step by step as it was given).

    Args:
        inputs: Of several steps.
        like: What is stacked in this layout is stacked in the new one too.

    Raises:
        NotAlikeError: They differ in more than the values of tensors.
    """
    given: Any = list(inputs)
    first, *others = given
    leaves, spec = optree.tree_flatten(first)
    try:
        # Eight times as fast as to flatten each and compare.
        rows = [leaves, *(spec.flatten_up_to(other) for other in others)]
    except ValueError:
        raise NotAlikeError("the inputs of two steps have another structure") from None
    columns = list(zip(*rows, strict=True))
    before = like.kinds if like is not None and like.spec == spec else (None,) * len(columns)
    kinds, shared, stacked, learned = [], [], [], []
    for column, known in zip(columns, before, strict=True):
        kind = _kind(column)
        if known is not None and known.is_stacked and isinstance(column[0], Tensor | float):
            kind = Kind(None, True, True, kind.is_learned)
        kinds.append(kind)
        if kind.is_stacked:
            with torch.no_grad():
                stacked.append(torch.stack(list(map(_as_tensor, column))))
            if kind.is_learned:
                learned.append(column)
        elif kind.is_tensor:
            shared.append(column[0])
    return InputLayout(spec, tuple(kinds)), shared, stacked, learned


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
    if len({(leaf.shape, leaf.dtype) for leaf in column}) > 1:
        raise NotAlikeError("the inputs of two steps have other shapes or dtypes")
    if first.layout is not torch.strided:
        raise NotAlikeError("sparse inputs differ from step to step")
    return Kind(None, True, True, learned)


def _as_tensor(leaf: Any) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64)


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
