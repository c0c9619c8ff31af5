"""The outer variables, what one inner step starts from, and what it takes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import optree
import torch
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.tree import (
    detach,
    is_variable,
    kind_of,
    named_leaves,
    needs_gradient,
    partition,
    to_device,
)


@final
class OuterVariables:
    """Detached copies of the outer variables, made leaves of a private graph.

    Args:
        outer: A pytree of floating-point tensors.

    Attributes:
        names: Of the leaves.
        leaves: Those that the inner run depends on.
        tree: These leaves, arranged as the outer variables are.
        own_leaves: Others of the same values, for the outer loss and those along the run, so that
            what one of these takes from the inner run by other ways than θ can be told.
        own_tree: These, arranged likewise.

    Raises:
        ProblemError: `outer` is empty or holds something else.
    """

    def __init__(self, outer: Any) -> None:
        self.names = []
        self.leaves: list[Tensor] = []
        for name, leaf in named_leaves(outer):
            if not is_variable(leaf):
                raise ProblemError(
                    f"outer variable {name!r} is {kind_of(leaf)}; outer variables must be dense "
                    "floating-point tensors of at least 16 bits, constants belong in the problem"
                )
            self.names.append(name)
            self.leaves.append(leaf.detach().clone().requires_grad_())
        if not self.leaves:
            raise ProblemError("there are no outer variables to differentiate")
        self._spec = optree.tree_structure(outer)
        self.tree = self.like(self.leaves)
        self.own_leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        self.own_tree = self.like(self.own_leaves)

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


@dataclass(frozen=True)
class Iterate:
    """One point of the inner run.

    Attributes:
        params: θ_t ∈ R^p, flat.
        state: s_t, the optimizer's state.
        gradient: ∇_θ ℓ(θ_t, b_t) ∈ R^p, where the rollout was asked to keep it.
    """

    params: Tensor
    state: Any
    gradient: Tensor | None = None

    def to(self, device: torch.device) -> Iterate:
        """The same on another device."""
        if self.params.device == device:
            return self
        gradient = None if self.gradient is None else self.gradient.to(device)
        return Iterate(self.params.to(device), to_device(self.state, device), gradient)

    def detached(self) -> Iterate:
        """The same without a graph."""
        return Iterate(*detach((self.params, self.state, self.gradient)))


class StepInputs(NamedTuple):
    """What inner step t takes of φ.

    Attributes:
        batch: b_t = B(φ, t), a pytree.
        hyperparameters: h_t = h(φ, t), by name; each a tensor or a pytree of tensors.
    """

    batch: Any
    hyperparameters: dict[str, Any]
