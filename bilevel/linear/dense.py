"""The whole matrix, factorised."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_number
from bilevel.linear.solver import Solver, System


@final
class Dense(Solver):
    """Builds the p×p matrix by p products and solves by LU factorisation.

    Exact up to rounding for any regular matrix; memory p² and time p products + p³. For p up to a
    few thousand, and to check the other solvers.

    Args:
        tolerance: The relative residual above which the matrix counts as too ill-conditioned.

    Raises:
        ConfigurationError: An argument outside its range.
        SolverError: (in `solve`) The matrix is singular.
    """

    needs_symmetric = False
    uses_start = False

    def __init__(self, tolerance: float = 1e-3) -> None:
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        size = system.rhs.shape[-1]
        matrix = system.operator.columns(torch.arange(size))
        matrix.diagonal(dim1=-2, dim2=-1).add_(system.damping)
        x = torch.linalg.solve(matrix, system.rhs[..., None])[..., 0]
        return x, torch.zeros_like(system.rhs[..., 0]), ""
