"""An orthonormal basis that grows from one vector by products with a symmetric matrix."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer
from bilevel.errors import NonFiniteError


@final
class Lanczos:
    """The Krylov space of a symmetric A and a start b, span{b, Ab, A²b, …}, vector by vector.

    The caller multiplies, so that it decides when to stop:

        process = Lanczos(b, capacity)
        while process.next is not None:
            process.extend(A @ process.next)

    Every new vector is made orthogonal to all others twice, since in floating point the three-term
    recurrence alone loses that. QᵀAQ is therefore held in full; it is tridiagonal up to rounding.

    Args:
        start: b, of shape [p]; with b = 0 the basis is empty.
        capacity: The most vectors there may be, at least 1; they take capacity·p numbers.

    Attributes:
        next: The vector of unit norm whose product `extend` wants. None when there is no room, or
            when the basis spans an invariant subspace that holds b: A takes nothing out of it but a
            part of ε^¾ of the largest product, where ε is the rounding unit.
        matrix: QᵀAQ, symmetric, of shape [k, k], float64 on the CPU.

    Raises:
        ConfigurationError: `capacity` is below 1.
        NonFiniteError: b, or a product, is not finite.

    Source: Lanczos, J. Res. Natl. Bur. Stand. 45 (1950); twice is enough: Giraud et al., Comput.
    Math. Appl. 50 (2005).
    """

    def __init__(self, start: Tensor, capacity: int) -> None:
        self._capacity = min(check_integer("capacity", capacity), start.numel())
        self._rows = start.new_empty(self._capacity, start.numel())
        self._largest = 0.0
        self.matrix = torch.zeros(0, 0, dtype=torch.float64)
        norm = _finite_norm(start, "the start of the Krylov space")
        self.next: Tensor | None = start / norm if norm > 0 else None

    @property
    def basis(self) -> Tensor:
        """Q, orthonormal columns, of shape [p, k] for k products taken."""
        return self._rows[: len(self.matrix)].T

    def extend(self, image: Tensor) -> None:
        """Take `image` = A·`next`, of shape [p]: the basis is one vector longer."""
        if self.next is None:
            raise ValueError("the Krylov space has no further direction")
        self._largest = max(self._largest, _finite_norm(image, "a product with the matrix"))
        rank = len(self.matrix)
        self._rows[rank] = self.next
        rows = self._rows[: rank + 1]
        coefficients, residual = _projected(image, rows)
        correction, residual = _projected(residual, rows)

        grown = torch.zeros(rank + 1, rank + 1, dtype=torch.float64)
        grown[:rank, :rank] = self.matrix
        grown[rank] = grown[:, rank] = (coefficients + correction).double().cpu()
        self.matrix = grown

        length = float(torch.linalg.vector_norm(residual))
        noise = torch.finfo(image.dtype).eps ** 0.75 * self._largest
        self.next = None
        if rank + 1 < self._capacity and length > noise:
            # What is left of a vector after cancellation is orthogonal only up to its own rounding.
            residual = _projected(residual / length, rows)[1]
            self.next = residual / torch.linalg.vector_norm(residual)


def _projected(vector: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients of `vector` along orthonormal rows, what lies outside their span)."""
    coefficients = rows @ vector
    return coefficients, vector - coefficients @ rows


def _finite_norm(vector: Tensor, what: str) -> float:
    norm = float(torch.linalg.vector_norm(vector))
    if not norm < float("inf"):
        raise NonFiniteError(f"{what} is not finite: its norm is {norm}")
    return norm
