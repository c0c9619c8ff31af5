"""The few operations on pytrees of tensors that the rest of the package shares."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor


def is_differentiable(leaf: object) -> bool:
    """Whether a leaf is a tensor that can carry a derivative."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def needs_gradient(leaf: object) -> bool:
    """Whether a leaf is a tensor whose derivative is asked for."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad


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


def detach(tree: Any) -> Any:
    """The same pytree with every tensor cut off its graph."""
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def to_device(tree: Any, device: torch.device) -> Any:
    """The same pytree with every tensor on `device`."""
    return optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with a readable name: `images`, `layers/0/weight`; the root alone is `outer`."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    names = ["/".join(str(part) for part in path) or "outer" for path in paths]
    return list(zip(names, leaves, strict=True))
