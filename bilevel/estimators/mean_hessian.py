"""The second derivatives of the inner loss at one point, as products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.linear import HessianOperator, LinearOperator
from bilevel.recording.inner import InnerLoop
from bilevel.tree import needs_gradient, partition


@final
class MeanHessian(LinearOperator):
    """H = ∂²ℓ/∂θ², and ∂²ℓ/∂b∂θ, of the mean inner loss over some batches.

    ∇ℓ is linearised once, and a product is one backward pass through its graph. A loop that
    compiles has a graph of what a product takes beside ∇ℓ, and one of the rest.

    Args:
        inner: The inner loop.
        params: θ, flat, of shape [p].
        batches: The batches; what is learned of them requires a gradient.
    """

    def __init__(self, inner: InnerLoop, params: Tensor, batches: Sequence[Any]) -> None:
        super().__init__(params, symmetric=True)
        self._inner, self._params, self._batches = inner, params.detach(), list(batches)
        self.takes_vmap = inner.compiler is None
        leaves, rebuild = partition(self._batches, needs_gradient)
        self._learned = [leaf.detach().requires_grad_() for leaf in leaves]
        self._at = rebuild(self._learned)
        self._linear = self._linearised() if inner.compiler is None else None
        self._product: Callable[[Tensor], Tensor] | None = None
        if self._linear is not None:
            self._product = self._linear.product

    def product(self, vector: Tensor) -> Tensor:
        if self._product is None:
            compiler, given = self._inner.compiler, (self._inner, self._params, self._batches)
            assert compiler is not None
            found = compiler.linearised(_product, *given, vector=vector)
            self._product = self._linearised().product if found is None else found
        return self._product(vector)

    def mixed(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(∇ℓ, (∂∇ℓ/∂b)ᵀ v by leaf of the batches that is learned)."""
        if self._linear is not None:
            return self._linear.gradient, self._linear.pull(vector, self._learned)
        gradient, *pulled = self._inner.run(
            _mixed, self._inner, self._params, self._batches, vector
        )
        return gradient, pulled

    def _linearised(self) -> HessianOperator:
        return HessianOperator(
            lambda params: _gradient(self._inner, params, self._at), self._params
        )


def _gradient(inner: InnerLoop, params: Tensor, batches: Sequence[Any]) -> Tensor:
    """∇_θ of the mean inner loss, on its graph."""
    gradients = [inner.gradient_with_graph(params, batch)[0] for batch in batches]
    return gradients[0] if len(gradients) == 1 else torch.stack(gradients).mean(0)


def _product(inner: InnerLoop, params: Tensor, batches: Sequence[Any], vector: Tensor) -> Tensor:
    """Hv."""
    params = params.detach().requires_grad_()
    with torch.enable_grad():
        gradient = _gradient(inner, params, batches)
    if not gradient.requires_grad:
        return torch.zeros_like(params)
    return torch.autograd.grad(gradient, params, vector, materialize_grads=True)[0]


def _mixed(
    inner: InnerLoop, params: Tensor, batches: Sequence[Any], vector: Tensor
) -> list[Tensor]:
    """[∇ℓ, the products by the learned leaves of the batches]."""
    params = params.detach().requires_grad_()
    at = partition(batches, needs_gradient)[0]
    with torch.enable_grad():
        gradient = _gradient(inner, params, batches)
    pulled = [torch.zeros_like(x) for x in at]
    if at and gradient.requires_grad:
        pulled = list(torch.autograd.grad(gradient, at, vector, materialize_grads=True))
    return [gradient.detach(), *pulled]
