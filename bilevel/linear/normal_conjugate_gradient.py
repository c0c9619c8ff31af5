"""Conjugate gradients on the normal equations, for indefinite matrices."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.linear.solver import Solver, System, divide, dot, norm


@final
class NormalConjugateGradient(Solver):
    """Conjugate gradients on A²x = Ab in the form CGLS, two products an iteration.

    For any symmetric matrix, indefinite ones too: the residual ‖b − Ax‖ never grows, and for a
    singular A it tends to the least one. The price is the squared condition number: the residual
    falls by (κ − 1)/(κ + 1) an iteration where `ConjugateGradient` has √κ, so on positive definite
    matrices that one is much faster; `GMRES` needs fewer products but more memory.

    Args:
        max_iterations: At least 1.
        tolerance: Relative residual ‖b − (A + ρI)x‖/‖b‖ at which to stop.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Björck, Numerical Methods for Least Squares Problems (1996), algorithm 7.4.1.
    """

    needs_symmetric = True
    uses_start = True

    def __init__(self, max_iterations: int = 100, tolerance: float = 1e-5) -> None:
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        x = system.start
        residual = system.rhs - system.product(x) if bool(x.any()) else system.rhs
        slope = system.product(residual)
        direction, squared = slope, dot(slope, slope)
        iterations, largest = torch.zeros_like(squared), torch.zeros_like(squared)
        rounding = 100 * torch.finfo(squared.dtype).eps
        for _ in range(self.max_iterations):
            size = norm(residual)
            # Where ‖Ar‖ is rounding, the residual is the least there is; going on would only add
            # noise along the null space.
            active = (size > self.tolerance) & (squared.sqrt() > rounding * largest * size)
            if not bool(active.any()):
                break
            product = system.product(direction)
            moved = dot(product, product)
            active &= moved > 0
            largest = torch.maximum(largest, divide(moved.sqrt(), norm(direction), active))
            length = divide(squared, moved, active)
            x = x + length * direction
            residual = residual - length * product
            slope = system.product(residual)
            previous, squared = squared, dot(slope, slope)
            direction = slope + divide(squared, previous, active) * direction
            iterations += active
        return x, iterations[..., 0], ""
