"""The few operations on pytrees of tensors that the rest of the package shares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import optree
import torch
from torch import Tensor


def is_differentiable(leaf: object) -> bool:
    """Whether a leaf is a tensor that can carry a derivative, real or complex."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def is_variable(leaf: object) -> bool:
    """Whether a leaf can be optimised: a dense tensor of real numbers of at least 16 bits."""
    return (
        isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.itemsize > 1
        and is_dense(leaf)
        and not leaf.is_meta
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has an entry for every index of a regular shape."""
    return tensor.layout is torch.strided and not tensor.is_nested


def needs_gradient(leaf: object) -> bool:
    """Whether a leaf is a tensor whose derivative is asked for."""
    return isinstance(leaf, Tensor) and leaf.requires_grad


def in_double(tensor: Tensor) -> Tensor:
    """A differentiable tensor in double precision, another one as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def partition(
    tree: Any, keep: Callable[[Any], bool] = is_differentiable
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Split a pytree into the leaves for which `keep` holds and a function that puts others back.

    Returns:
        The chosen leaves in order, and `rebuild(leaves)`: the same tree with them replaced.
    """
    leaves, spec = optree.tree_flatten(tree)
    chosen = [keep(leaf) for leaf in leaves]

    def rebuild(replacements: Sequence[Tensor]) -> Any:
        remaining = iter(replacements)
        merged = [
            next(remaining) if is_chosen else leaf
            for leaf, is_chosen in zip(leaves, chosen, strict=True)
        ]
        return optree.tree_unflatten(spec, merged)

    return [leaf for leaf, is_chosen in zip(leaves, chosen, strict=True) if is_chosen], rebuild


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor of a pytree."""
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def detach(tree: Any) -> Any:
    """The same pytree with every tensor cut off its graph."""
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def kind_of(value: object) -> str:
    """What a value is, in words: "a torch.float64 tensor of shape (2, 3)", "a list"."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return f"a nested {value.dtype} tensor"
    layout = "" if value.layout is torch.strided else f" and layout {value.layout}"
    where = " on the meta device" if value.is_meta else ""
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}{layout}{where}"


def to_device(tree: Any, device: torch.device) -> Any:
    """The same pytree with every tensor on `device`."""
    return optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with a readable name: `images`, `layers/0/weight`; the root alone is `outer`."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    names = ["/".join(str(part) for part in path) or "outer" for path in paths]
    return list(zip(names, leaves, strict=True))


@final
@dataclass(frozen=True)
class Layout:
    """How a pytree of tensors of one dtype lies in one flat vector: leaf after leaf.

    The order is that of `optree.tree_leaves`, in which the keys of a dict are sorted.
    """

    spec: optree.PyTreeSpec
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tree: Any) -> "Layout":
        """That of a pytree with at least one leaf."""
        leaves, spec = optree.tree_flatten(tree)
        shapes = tuple(leaf.shape for leaf in leaves)
        return cls(spec, shapes, leaves[0].dtype, leaves[0].device)

    @cached_property
    def sizes(self) -> list[int]:
        """Entries of every leaf."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def example(self) -> Any:
        """A pytree of this layout, to look at shapes, dtype and device; it takes no memory."""
        leaf = torch.zeros((), dtype=self.dtype, device=self.device)
        return optree.tree_unflatten(self.spec, [leaf.expand(shape) for shape in self.shapes])

    def ravel(self, tree: Any) -> Tensor:
        """The leaves as one vector."""
        return self.join(self.flatten(tree))

    def join(self, leaves: Sequence[Tensor]) -> Tensor:
        """The vector with these leaves."""
        # An expanded leaf stays one when it is reshaped, and forward mode cannot write to it.
        flat = [leaf.reshape(-1).contiguous() for leaf in leaves]
        vector = flat[0] if len(flat) == 1 else torch.cat(flat)
        # Made under torch.inference_mode; a copy has no such mark.
        return vector.clone() if vector.is_inference() else vector

    def flatten(self, tree: Any) -> list[Tensor]:
        """The leaves of a pytree of this structure."""
        leaves: Any = self.spec.flatten_up_to(tree)
        return list(leaves)

    def unflatten(self, leaves: Sequence[Tensor]) -> Any:
        """The pytree with these leaves."""
        return optree.tree_unflatten(self.spec, list(leaves))

    def unravel(self, vector: Tensor) -> Any:
        """The pytree whose leaves are views of the vector."""
        if len(self.shapes) == 1:
            return optree.tree_unflatten(self.spec, [vector.view(self.shapes[0])])
        pieces = vector.split(self.sizes)
        leaves = [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        return optree.tree_unflatten(self.spec, leaves)
