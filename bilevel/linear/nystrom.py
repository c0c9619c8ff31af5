"""The Nyström approximation: the matrix from a few of its columns."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.linear.eigendecomposition import check_low_rank, invert_low_rank
from bilevel.linear.solver import Solver, System


@final
class Nystrom(Solver):
    """(A_k + ρI)⁻¹ b with A_k made of k random columns K of A, k products in all:

        A_k = A_{:,K} (A_{K,K})⁺ A_{K,:}

    Exact at k ≥ p, and for positive semi-definite matrices of rank r once the rows K have rank r.
    There is no iteration and no step size, so it cannot diverge; but curvature outside the span of
    the columns is taken to be zero, and x is 1/ρ times b there. For positive semi-definite matrices
    with a fast falling spectrum; on an indefinite one A_{K,K} may be nearly singular by chance.

    The paper's form, b/ρ − A_{:,K}(A_{K,K} + A_{K,:}A_{:,K}/ρ)⁻¹A_{K,:}b/ρ² (equation 4),
    loses all digits when ρ is far below the eigenvalues. This one goes through an orthonormal
    basis of the columns and does not.

    Args:
        rank: k, at least 1.
        tolerance: Relative residual ‖b − (A + ρI)x‖/‖b‖ above which to warn: the part of b that the
            rank is too low for.

    Raises:
        ConfigurationError: An argument outside its range; in `solve`, damping = 0 with rank < p.

    Source: Hataya and Yamada, arXiv 2302.09726.
    """

    needs_symmetric = True
    uses_start = False

    def __init__(self, rank: int, tolerance: float = 1e-2) -> None:
        self.rank = check_integer("rank", rank)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        check_low_rank(self, self.rank, system)
        size = system.rhs.shape[-1]
        generator = system.generator
        chosen = torch.randperm(size, generator=generator, device=generator.device)[: self.rank]
        columns = system.operator.columns(chosen)
        core = columns[..., chosen.to(columns.device), :]
        basis, triangle = torch.linalg.qr(columns)
        small = triangle @ torch.linalg.pinv((core + core.mT) / 2, hermitian=True) @ triangle.mT
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        x = invert_low_rank(values, basis @ vectors, system)
        return x, torch.zeros_like(system.rhs[..., 0]), ""
