"""The second derivatives of the inner loss at one point, as products with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.linear import HessianOperator, LinearOperator
from bilevel.recording.inner import InnerLoop
from bilevel.tree import needs_gradient, partition


@final
class MeanHessian(LinearOperator):
    """H = ∂²ℓ/∂θ², and ∂²ℓ/∂b∂θ, of the mean inner loss over some batches.

    In eager mode ∇ℓ is linearised once, and a product is one backward pass through its graph. A
    loop that compiles has a graph for a product, in which ∇ℓ is taken anew: that is faster still.

    Args:
        inner: The inner loop.
        params: θ, flat, of shape [p].
        batches: The batches; what is learned of them requires a gradient.
    """

    def __init__(self, inner: InnerLoop, params: Tensor, batches: Sequence[Any]) -> None:
        super().__init__(params, symmetric=True)
        self._inner, self._params, self._batches = inner, params.detach(), list(batches)
        self.takes_vmap = inner.compiler is None
        if inner.compiler is None:
            leaves, rebuild = partition(self._batches, needs_gradient)
            self._learned = [leaf.detach().requires_grad_() for leaf in leaves]
            at = rebuild(self._learned)
            self._linear = HessianOperator(lambda params: _gradient(inner, params, at), params)

    def product(self, vector: Tensor) -> Tensor:
        if self._inner.compiler is None:
            return self._linear.product(vector)
        return self._compiled(vector, mixed=False)[1]

    def mixed(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(∇ℓ, (∂∇ℓ/∂b)ᵀ v by leaf of the batches that is learned)."""
        if self._inner.compiler is None:
            return self._linear.gradient, self._linear.pull(vector, self._learned)
        gradient, *pulled = self._compiled(vector, mixed=True)
        return gradient, pulled

    def _compiled(self, vector: Tensor, *, mixed: bool) -> list[Tensor]:
        found: list[Tensor] = self._inner.run(
            _products, self._inner, self._params, self._batches, vector, mixed
        )
        return found


def _gradient(inner: InnerLoop, params: Tensor, batches: Sequence[Any]) -> Tensor:
    """∇_θ of the mean inner loss, on its graph."""
    gradients = [inner.gradient_with_graph(params, batch)[0] for batch in batches]
    return gradients[0] if len(gradients) == 1 else torch.stack(gradients).mean(0)


def _products(
    inner: InnerLoop, params: Tensor, batches: Sequence[Any], vector: Tensor, mixed: bool
) -> list[Tensor]:
    """[∇ℓ, Hv], or with `mixed` [∇ℓ, the products by the learned leaves of the batches]."""
    params = params.detach().requires_grad_()
    at = partition(batches, needs_gradient)[0] if mixed else [params]
    with torch.enable_grad():
        gradient = _gradient(inner, params, batches)
    pulled = [torch.zeros_like(x) for x in at]
    if at and gradient.requires_grad:
        pulled = list(torch.autograd.grad(gradient, at, vector, materialize_grads=True))
    return [gradient.detach(), *pulled]
