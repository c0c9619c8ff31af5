"""A few eigenpairs of a symmetric matrix by random sketching, and inversion with them."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.errors import ConfigurationError
from bilevel.linear.operator import LinearOperator
from bilevel.linear.solver import Solver, System


def randomized_eigendecomposition(
    operator: LinearOperator,
    rank: int,
    *,
    oversampling: int,
    power_iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A ≈ V diag(s) Vᵀ for a symmetric A, with the `rank` values largest in magnitude.

    Y = A^{q+1} Ω with Gaussian Ω of k + oversampling columns, an orthonormal basis after every
    product; Q from Y; then the eigenpairs of QᵀAQ, lifted by Q. It takes (k + oversampling)(q + 2)
    products and is exact when A has rank k, or k = p.

    Args:
        operator: A, symmetric, on vectors of shape [..., p].
        rank: k, at least 1; at most p are returned.
        oversampling: Columns beyond k, at least 0.
        power_iterations: q, at least 0; each divides the part outside the leading eigenvectors by
            the ratio of the eigenvalues.
        generator: Source of randomness.

    Returns:
        (s of shape [..., k] by falling magnitude, V of shape [..., p, k] with orthonormal columns).

    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.3.
    """
    size = operator.shape[-1]
    columns = min(rank + oversampling, size)
    draws = torch.randn(
        (*operator.shape, columns),
        dtype=operator.dtype,
        device=generator.device,
        generator=generator,
    ).to(operator.device)

    basis = torch.linalg.qr(operator.many(draws))[0]
    for _ in range(power_iterations):
        basis = torch.linalg.qr(operator.many(basis))[0]
    small = basis.mT @ operator.many(basis)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    order = values.abs().argsort(dim=-1, descending=True)[..., :rank]
    values = values.gather(-1, order)
    vectors = vectors.gather(-1, order[..., None, :].expand(*vectors.shape[:-1], order.shape[-1]))
    return values, basis @ vectors


@final
class RandomizedEigendecomposition(Solver):
    """(V diag(s) Vᵀ + ρI)⁻¹ b by Woodbury, with the leading eigenpairs of A in place of A:

        x = V diag(1/(s + ρ)) Vᵀb + (b − V Vᵀb)/ρ

    so curvature beyond the `rank` leading eigenvalues is taken to be zero. Exact at rank ≥ p and
    for matrices of that rank. The basis costs many products and does not look at b, so for one b
    `ConjugateGradient` with as many products is nearly always closer.

    Args:
        rank: k, at least 1.
        oversampling: As in `randomized_eigendecomposition`.
        power_iterations: As there.
        tolerance: Relative residual ‖b − (A + ρI)x‖/‖b‖ above which to warn: the part of b that the
            rank is too low for.

    Raises:
        ConfigurationError: An argument outside its range; in `solve`, damping = 0 with rank < p.
    """

    needs_symmetric = True
    uses_start = False

    def __init__(
        self, rank: int, oversampling: int = 8, power_iterations: int = 1, tolerance: float = 1e-2
    ) -> None:
        self.rank = check_integer("rank", rank)
        self.oversampling = check_integer("oversampling", oversampling, 0)
        self.power_iterations = check_integer("power_iterations", power_iterations, 0)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        check_low_rank(self, self.rank, system)
        values, vectors = randomized_eigendecomposition(
            system.operator,
            self.rank,
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            generator=system.generator,
        )
        return invert_low_rank(values, vectors, system), torch.zeros_like(system.rhs[..., 0]), ""


def check_low_rank(solver: Solver, rank: int, system: System) -> None:
    """Raise `ConfigurationError` where a low-rank matrix alone would have no inverse."""
    size = system.rhs.shape[-1]
    if rank < size and not system.damping:
        raise ConfigurationError(
            f"damping={system.damping:g}: {type(solver).__name__} of rank {rank} below the number "
            f"of parameters, {size}, needs a damping above 0"
        )


def invert_low_rank(values: Tensor, vectors: Tensor, system: System) -> Tensor:
    """(V diag(s) Vᵀ + ρI)⁻¹ b for orthonormal V of shape [..., p, k]."""
    inside = (vectors.mT @ system.rhs[..., None])[..., 0]
    x = (vectors @ (inside / (values + system.damping))[..., None])[..., 0]
    if vectors.shape[-1] < vectors.shape[-2]:
        x = x + (system.rhs - (vectors @ inside[..., None])[..., 0]) / system.damping
    return x
