"""The outer variables: private leaves for one call, and the gradients of the user's own."""

from collections.abc import Sequence
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.tree import is_differentiable, named_leaves, needs_gradient, partition


@final
class OuterVariables:
    """Detached copies of the outer variables, made leaves of a private graph.

    Args:
        outer: A pytree of floating-point tensors.

    Attributes:
        tree: The leaves, arranged as the outer variables are.

    Raises:
        ProblemError: `outer` is empty or holds something else.
    """

    def __init__(self, outer: Any) -> None:
        self.names = []
        self.leaves: list[Tensor] = []
        for name, leaf in named_leaves(outer):
            if not is_differentiable(leaf):
                kind = f"{leaf.dtype} tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ProblemError(
                    f"outer variable {name!r} is a {kind}; outer variables must be floating-point "
                    "tensors, constants belong in the problem"
                )
            self.names.append(name)
            self.leaves.append(leaf.detach().clone().requires_grad_())
        if not self.leaves:
            raise ProblemError("there are no outer variables to differentiate")
        self._spec = optree.tree_structure(outer)
        self.tree = self.like(self.leaves)

    def like(self, leaves: Sequence[Tensor]) -> Any:
        """`leaves` arranged as the outer variables are."""
        return optree.tree_unflatten(self._spec, list(leaves))

    def slopes(self, tree: Any) -> Sequence[Tensor | None]:
        """The derivative of the sum of all entries of a pytree, leaf by leaf; its graph stays."""
        outputs = partition(tree, needs_gradient)[0]
        if not outputs:
            return []
        ones = [torch.ones_like(output) for output in outputs]
        return torch.autograd.grad(outputs, self.leaves, ones, retain_graph=True, allow_unused=True)


def leaves_with_grad(outer: Any) -> list[Tensor]:
    """The outer tensors as the user holds them, each fit to have its `.grad` filled.

    Raises:
        ProblemError: One is not a leaf that requires gradients.
    """
    leaves = named_leaves(outer)
    for name, leaf in leaves:
        if not (isinstance(leaf, Tensor) and leaf.is_leaf and leaf.requires_grad):
            raise ProblemError(
                f"outer variable {name!r} is not a leaf tensor with requires_grad=True, so "
                "its .grad cannot be filled: for variables that are computed, use "
                "Hypergradient.loss(outer, batch).backward()"
            )
    return [leaf for _, leaf in leaves]


@torch.no_grad()
def add_to_grad(leaves: Sequence[Tensor], grads: Any) -> None:
    """Add the pytree `grads` to the `.grad` of `leaves`, as autograd would."""
    for leaf, grad in zip(leaves, optree.tree_leaves(grads), strict=True):
        if leaf.grad is None:
            leaf.grad = grad.clone()
        else:
            leaf.grad.add_(grad)
