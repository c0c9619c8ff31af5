"""The Neumann series, which is what an unrolled run computes at a converged point."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.errors import SolverError
from bilevel.linear.solver import Solver, System, norm

#: Beyond this growth of the residual the series has no use.
GROWTH = 100.0


@final
class Neumann(Solver):
    """A truncated Neumann series, one product a term:

        x_K = α Σ_{k<K} (I − αA)ᵏ b,    b − A x_K = (I − αA)ᴷ b    (from a start of 0)

    It converges when every eigenvalue of I − αA is inside the unit circle, for symmetric positive
    definite A when 0 < α < 2/λ_max; fastest at α = 2/(λ_max + λ_min), and even there slower than
    `ConjugateGradient`. With α = the inner learning rate, K terms are K unrolled steps of gradient
    descent that stand still at the last iterate; that is its use: as the natural series of a
    `FixedPoint`, where A = I − ∂Φᵀ and α = 1.

    Args:
        step_size: α, above 0.
        max_iterations: K, at least 1.
        tolerance: Relative residual ‖b − (A + ρI)x‖/‖b‖ at which to stop.

    Raises:
        ConfigurationError: An argument outside its range.
        SolverError: (in `solve`) The residual has grown a hundredfold. (Less may be transient,
            where I − αA is not normal, as with momentum.)

    Source: Lorraine, Vicol and Duvenaud, arXiv 1911.02590, algorithm 3; Luketina et al.,
    arXiv 1511.06727, is K = 1.
    """

    needs_symmetric = False
    uses_start = True

    def __init__(
        self, step_size: float, max_iterations: int = 100, tolerance: float = 1e-5
    ) -> None:
        self.step_size = check_number("step_size", step_size, above=0)
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        x = system.start
        residual = system.rhs - system.product(x) if bool(x.any()) else system.rhs
        first = size = norm(residual)
        iterations = torch.zeros_like(size)
        for _ in range(self.max_iterations):
            active = size > self.tolerance
            if not bool(active.any()):
                break
            x = torch.where(active, x + self.step_size * residual, x)
            residual = system.rhs - system.product(x)
            size = norm(residual)
            iterations += active
        advice = (
            "lower step_size below 2/λ_max, raise damping if the matrix is not positive definite, "
            "or use another solver"
        )
        # Not `size > …`, which a NaN would pass.
        if not bool((size <= GROWTH * first).all()):
            raise SolverError(
                f"Neumann(step_size={self.step_size:g}) diverges: after {int(iterations.max())} "
                f"terms the residual has grown {float((size / first).max()):.2g} times; {advice}"
            )
        grown = bool((size > first).any())
        remark = f", having grown: the series may diverge; {advice}" if grown else ""
        return x, iterations[..., 0], remark
