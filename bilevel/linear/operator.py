"""Matrices that are known only through their products with vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

#: So many numbers at most go through `vmap` at once. Where launching operations takes the time it
#: is many times faster than one product after the other; where arithmetic does, it only costs
#: memory.
NUMBERS_PER_VMAP = 2**15


class LinearOperator(ABC):
    """A square matrix A, or a batch of independent ones, known through v ↦ Av.

    Args:
        like: A tensor of the shape [..., p], dtype and device of the vectors that A takes. The
            leading dimensions run over independent matrices, one p×p matrix each.
        symmetric: Whether A = Aᵀ, which some solvers need.

    Attributes:
        products: How many products have been asked for; one with a whole batch counts as one.
        takes_vmap: Whether `torch.func.vmap` can follow a product.
    """

    takes_vmap: bool = True

    def __init__(self, like: Tensor, *, symmetric: bool) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.symmetric = symmetric
        self.products = 0

    @abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Av; by default, in operations that `vmap` can follow. Not counted: call the object."""

    @final
    @torch.no_grad()
    def __call__(self, vector: Tensor) -> Tensor:
        """Av for v of shape [..., p], without a graph."""
        self.products += 1
        return self.product(vector)

    @final
    @torch.no_grad()
    def many(self, vectors: Tensor) -> Tensor:
        """A applied to the columns of `vectors`, [..., p, k]: k products.

        Short vectors go through `torch.func.vmap` together, long ones one after the other, so that
        memory is that of one product.
        """
        self.products += vectors.shape[-1]
        vectors_at_once = min(NUMBERS_PER_VMAP // self.shape.numel(), vectors.shape[-1])
        if vectors_at_once <= 1 or not self.takes_vmap:
            return torch.stack([self.product(vector) for vector in vectors.unbind(-1)], dim=-1)
        return torch.func.vmap(self.product, in_dims=-1, out_dims=-1, chunk_size=vectors_at_once)(
            vectors
        )

    @final
    def columns(self, indices: Tensor) -> Tensor:
        """The columns of A at `indices` (int64, [k]), of every matrix of a batch: [..., p, k]."""
        units = torch.zeros(*self.shape, len(indices), dtype=self.dtype, device=self.device)
        units[..., indices.to(self.device), torch.arange(len(indices), device=self.device)] = 1
        return self.many(units)


@final
class HessianOperator(LinearOperator):
    """H = ∂g/∂θ, the Hessian of a loss, from the function g that gives its gradient.

    g is linearised once; a product is one backward pass through that graph, which lives as long as
    this object. To have many losses at once, let g map [..., p] to [..., p] row by row, as
    `torch.func.vmap(torch.func.grad(loss))` does.

    Args:
        gradient: θ ↦ ∇_θ ℓ(θ), differentiable by autograd.
        params: θ, of shape [..., p].

    Attributes:
        gradient: ∇_θ ℓ(θ), of shape [..., p].
    """

    def __init__(self, gradient: Callable[[Tensor], Tensor], params: Tensor) -> None:
        super().__init__(params, symmetric=True)
        self._params = params.detach().requires_grad_()
        with torch.enable_grad():
            self._gradient = gradient(self._params)
        self.gradient = self._gradient.detach()

    def product(self, vector: Tensor) -> Tensor:
        return self.pull(vector, [self._params])[0]

    def pull(self, vector: Tensor, at: Sequence[Tensor]) -> list[Tensor]:
        """(∂g/∂x)ᵀ v for every x of `at`, on which g depends: leaves that require a gradient."""
        if not (at and self._gradient.requires_grad):
            return [torch.zeros_like(x) for x in at]
        return list(
            torch.autograd.grad(
                self._gradient, at, vector, retain_graph=True, materialize_grads=True
            )
        )
