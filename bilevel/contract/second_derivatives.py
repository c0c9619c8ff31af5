"""Second derivatives of an inner loss, to see whether they are the same when it is run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.tree import detach, needs_gradient, partition


@final
class SecondDerivatives:
    """∇_{θ,b} ⟨∇_θ ℓ(θ, b), v⟩ for one v, at one point.

    A state that is in the second derivatives alone, as of c(θ − θ.detach())², changes neither the
    loss nor its gradient.

    Args:
        loss: ℓ(θ, b).
        params: θ, flat.
        batch: b; its leaves that require a gradient are those that are differentiated by.
    """

    def __init__(self, loss: Callable[[Tensor, Any], Tensor], params: Tensor, batch: Any) -> None:
        self._loss, self._params = loss, params.detach().clone()
        leaves, self._rebuild = partition(batch, needs_gradient)
        self._leaves = detach(leaves)
        drawn = torch.randn(params.shape, generator=torch.Generator().manual_seed(0))
        self._direction = drawn.to(params)
        self._products = self._taken()

    def check(self) -> None:
        """Raise `ProblemError` unless they are what they were."""
        now = self._taken()
        if not _is_same(self._products, now):
            raise other_second_derivative()

    @torch.enable_grad()
    def _taken(self) -> list[Tensor]:
        """Nothing where there is no second derivative, of which an estimator that needs it says."""
        params = self._params.detach().requires_grad_()
        leaves = [leaf.detach().requires_grad_() for leaf in self._leaves]
        try:
            loss = self._loss(params, self._rebuild([leaf.view_as(leaf) for leaf in leaves]))
            (gradient,) = torch.autograd.grad(loss, params, create_graph=True)
            if not gradient.requires_grad:
                return []
            found = torch.autograd.grad(
                gradient, [params, *leaves], self._direction, materialize_grads=True
            )
        except RuntimeError:
            return []
        return list(found)


def other_second_derivative() -> ProblemError:
    """The error that says that the inner loss hides a state in its derivatives."""
    return ProblemError(
        "inner_loss is no pure function: run again at the same parameters and batch it has the "
        "same value, but another second derivative. Look for a counter, a generator or a buffer "
        "that it changes (docs/contract.md; bilevel.gradcheck looks at every method)"
    )


def _is_same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether products agree up to what rounding does to them."""
    if len(ones) != len(others):
        return False
    sizes = [float(one.nan_to_num().abs().max()) if one.numel() else 0.0 for one in ones]
    for one, other, size in zip(ones, others, sizes, strict=True):
        rounding = torch.finfo(one.dtype).eps
        allowed = rounding**0.5 * size + 1000 * rounding * max(sizes)
        if not torch.allclose(one, other, rtol=0, atol=allowed, equal_nan=True):
            return False
    return True
