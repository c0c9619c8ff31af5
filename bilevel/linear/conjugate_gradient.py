"""Conjugate gradients, for positive definite matrices."""

import math
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.linear.solver import Solver, System, divide, dot


@final
class ConjugateGradient(Solver):
    """Conjugate gradients, one product an iteration; the A-norm of the error falls at least by

        (√κ − 1)/(√κ + 1)    an iteration, with κ = λ_max/λ_min of A + ρI.

    For symmetric positive definite matrices. Stopping early is a regularisation: directions of
    small curvature are left out. On an indefinite matrix it may still end at a solution, and
    the measured residual tells, but nothing promises it: raise the damping, or take `GMRES` or
    `NormalConjugateGradient`.

    Args:
        max_iterations: At least 1.
        tolerance: Relative residual ‖b − (A + ρI)x‖/‖b‖ at which to stop. Rounding leaves up to
            κ times the rounding unit of it (6e-8 in float32).

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Hestenes and Stiefel, J. Res. NBS 49 (1952), 409–436, section 3; as a hypergradient:
    Pedregosa, arXiv 1602.02355; Rajeswaran et al. (iMAML), arXiv 1909.04630.
    """

    needs_symmetric = True
    uses_start = True

    def __init__(self, max_iterations: int = 100, tolerance: float = 1e-5) -> None:
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        if system.rhs.dim() == 1:
            x, iterations, indefinite = self._solve_one(system)
        else:
            x, iterations, indefinite = self._solve_many(system)
        remark = (
            ", having met a direction of negative curvature, so the matrix is not positive "
            "definite: raise damping, or use GMRES or NormalConjugateGradient"
        )
        return x, iterations, remark if indefinite else ""

    def _solve_one(self, system: System) -> tuple[Tensor, Tensor, bool]:
        """One system, its scalars as Python's numbers: a fifth of the operations on tensors."""
        x = system.start
        residual = system.rhs - system.product(x) if bool(x.any()) else system.rhs
        direction, squared = residual, float(residual @ residual)
        iterations, indefinite = 0, False
        while iterations < self.max_iterations and math.sqrt(squared) > self.tolerance:
            product = system.product(direction)
            curvature = float(direction @ product)
            indefinite |= curvature <= 0
            if curvature == 0:
                break
            length = squared / curvature
            x = torch.add(x, direction, alpha=length)
            residual = torch.add(residual, product, alpha=-length)
            previous, squared = squared, float(residual @ residual)
            direction = torch.add(residual, direction, alpha=squared / previous)
            iterations += 1
        return x, torch.tensor(iterations), indefinite

    def _solve_many(self, system: System) -> tuple[Tensor, Tensor, bool]:
        """Independent systems side by side; one that has converged stays as it is."""
        x = system.start
        residual = system.rhs - system.product(x) if bool(x.any()) else system.rhs
        direction, squared = residual, dot(residual, residual)
        iterations = torch.zeros_like(squared)
        indefinite = torch.zeros_like(squared, dtype=torch.bool)
        for _ in range(self.max_iterations):
            active = squared.sqrt() > self.tolerance
            if not bool(active.any()):
                break
            product = system.product(direction)
            curvature = dot(direction, product)
            indefinite |= active & (curvature <= 0)
            active &= curvature != 0
            if not bool(active.any()):
                break
            length = divide(squared, curvature, active)
            x = x + length * direction
            residual = residual - length * product
            previous, squared = squared, dot(residual, residual)
            direction = residual + divide(squared, previous, active) * direction
            iterations += active
        return x, iterations[..., 0], bool(indefinite.any())
