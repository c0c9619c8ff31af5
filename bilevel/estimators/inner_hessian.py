"""The inner gradient at one point, linearised once for many products."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.linear import LinearOperator
from bilevel.recording.inner import InnerLoop
from bilevel.tree import needs_gradient, partition


@final
class InnerHessian(LinearOperator):
    """H = ∇²_θ ℓ(θ, b) with its mixed derivative, through one graph of ∇_θ ℓ(θ, b).

    By autograd over autograd: in eager mode that beats `torch.func.vjp(torch.func.grad(…))`, which
    cannot use the fused first-order kernels, nor add gradients up in place.

    Args:
        inner: The inner loop, whose loss it is.
        params: θ, of shape [p].
        batch: b; the leaves that require a gradient are those of the mixed derivative.

    Attributes:
        gradient: ∇_θ ℓ(θ, b), of shape [p], without a graph.
        loss: ℓ(θ, b), without a graph.
    """

    def __init__(self, inner: InnerLoop, params: Tensor, batch: Any) -> None:
        super().__init__(params, symmetric=True)
        inputs, rebuild = partition(batch, needs_gradient)
        self._points = [leaf.detach().requires_grad_() for leaf in (params, *inputs)]
        with torch.enable_grad():
            self._gradient, loss = inner.gradient_with_graph(
                self._points[0], rebuild(self._points[1:])
            )
        self.loss = loss.detach()
        self.gradient = self._gradient.detach()

    def product(self, vector: Tensor) -> Tensor:
        return self._pull(self._points[:1], vector, keep=True)[0]

    def mixed(self, vector: Tensor) -> Sequence[Tensor]:
        """∂_b ⟨∇_θ ℓ, v⟩ by leaf, for one v: the graph is gone afterwards."""
        return self._pull(self._points[1:], vector, keep=False)

    def _pull(self, points: list[Tensor], vector: Tensor, *, keep: bool) -> Sequence[Tensor]:
        if not self._gradient.requires_grad or not points:
            return [torch.zeros_like(point) for point in points]
        return torch.autograd.grad(
            self._gradient, points, vector, retain_graph=keep, materialize_grads=True
        )
