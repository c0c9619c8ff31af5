"""The interface of a linear solver, and what all of them share: scaling, checks, the verdict."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError, ConvergenceWarning, SolverError
from bilevel.linear.operator import LinearOperator

#: v ↦ (A + damping·I)v.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class System:
    """(A + ρI)x = b with every b of a batch scaled to ‖b‖₂ = 1 (or left at 0).

    Attributes:
        operator: A.
        damping: ρ.
        rhs: b, of shape [..., p].
        start: Where to start, of shape [..., p].
        generator: Source of randomness.
    """

    operator: LinearOperator
    damping: float
    rhs: Tensor
    start: Tensor
    generator: torch.Generator

    def product(self, vector: Tensor) -> Tensor:
        """(A + ρI)v."""
        product = self.operator(vector)
        return product + self.damping * vector if self.damping else product


@dataclass(frozen=True)
class Solution:
    """What a solver found, and how good it is.

    Attributes:
        x: The solution, of shape [..., p].
        residual: ‖b − (A + ρI)x‖₂ / ‖b‖₂, computed from x at the end by one product; 0 where
            b = 0; shape [...].
        iterations: Iterations of each system; int64, shape [...].
        products: Products with A, the one for `residual` included.
        converged: Whether every residual is at most the solver's tolerance.
        status: "converged", or a sentence that says what went wrong.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    products: int
    converged: bool
    status: str


class Solver(ABC):
    """Solves (A + ρI)x = b for one matrix, or for a batch of them with a verdict on each.

    Attributes:
        tolerance: The largest relative residual that counts as converged, below 1, which is that
            of x = 0. Beyond it, `solve` gives a `ConvergenceWarning` and a status that says so.
        needs_symmetric: Whether A must be symmetric.
        uses_start: Whether a good start makes it faster.
    """

    tolerance: float
    needs_symmetric: bool
    uses_start: bool

    @abstractmethod
    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        """(x, iterations, a remark for the status when it did not converge, or "")."""

    @final
    @torch.no_grad()
    def solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        *,
        damping: float = 0.0,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Solution:
        """Solve (A + ρI)x = b.

        Args:
            operator: A.
            rhs: b, of the shape of the operator's vectors, [..., p]. The leading dimensions are
                independent systems; one that has converged stays as it is while others go on.
            damping: ρ, at least 0.
            start: Where an iterative solver starts, of b's shape; default: 0.
            generator: Source of randomness for the solvers that need it; default: a fixed seed.

        Raises:
            ConfigurationError: The shapes do not fit, or the solver cannot work on such a matrix.
            SolverError: There is no solution, or the iteration diverges.

        Warns:
            ConvergenceWarning: The residual stayed above `tolerance`.
        """
        if rhs.shape != operator.shape or (start is not None and start.shape != rhs.shape):
            raise ConfigurationError(
                f"rhs of shape {tuple(rhs.shape)}"
                + ("" if start is None else f" and start of shape {tuple(start.shape)}")
                + f" for an operator on vectors of shape {tuple(operator.shape)}: they must agree"
            )
        if self.needs_symmetric and not operator.symmetric:
            raise ConfigurationError(
                f"{type(self).__name__} needs a symmetric matrix, which the one of a fixed point "
                "is not: use Neumann, GMRES or Dense"
            )
        if generator is None:
            generator = torch.Generator(device=rhs.device).manual_seed(0)
        before = operator.products
        largest = rhs.abs().amax(dim=-1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            nan = torch.full_like(largest[..., 0], torch.nan)
            status = "not solved: the right-hand side is not finite"
            return Solution(rhs * torch.nan, nan, torch.zeros_like(nan).long(), 0, False, status)
        # In two steps, since the squares of very small numbers would vanish.
        scale = torch.where(largest > 0, largest, 1)
        scale = scale * torch.where(largest > 0, norm(rhs / scale), 1)
        system = System(
            operator,
            damping,
            rhs / scale,
            torch.zeros_like(rhs) if start is None else start / scale * (largest > 0),
            generator,
        )
        try:
            x, iterations, remark = self._solve(system)
        except torch.linalg.LinAlgError as error:
            raise self._failure(damping, str(error)) from error
        x = x * (largest > 0)
        residual = norm(system.rhs - system.product(x))[..., 0]
        if not bool(torch.isfinite(residual).all()):
            raise self._failure(damping, "the solution is not finite")
        converged, status = self._verdict(residual, iterations, remark)
        products = operator.products - before
        return Solution(x * scale, residual, iterations.long(), products, converged, status)

    def _verdict(self, residual: Tensor, iterations: Tensor, remark: str) -> tuple[bool, str]:
        """(whether it converged, the status); warns if it did not."""
        worst, most = float(residual.max()), int(iterations.max())
        if worst <= self.tolerance:
            return True, "converged"
        # The text is constant, so that Python shows it once and not at every outer step.
        warnings.warn(
            f"{type(self).__name__} did not reach its tolerance of {self.tolerance:g}; the status "
            "in the result's stats says how far it came",
            ConvergenceWarning,
            stacklevel=5,
        )
        return False, (
            f"{type(self).__name__} stopped "
            + (f"after {most} iterations " if most else "")
            + f"at a relative residual of {worst:.2g}, above its tolerance of "
            f"{self.tolerance:g}{remark}"
        )

    def _failure(self, damping: float, reason: str) -> SolverError:
        return SolverError(
            f"{type(self).__name__} failed with damping={damping:g}: {reason}; the matrix is "
            "singular, or not finite: raise damping, or look at the inner run"
        )


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products along the last dimension, which is kept: [..., 1]."""
    return (left * right).sum(dim=-1, keepdim=True)


def norm(vector: Tensor) -> Tensor:
    """‖v‖₂ along the last dimension, which is kept: [..., 1]."""
    return torch.linalg.vector_norm(vector, dim=-1, keepdim=True)


def divide(numerator: Tensor, denominator: Tensor, where: Tensor) -> Tensor:
    """numerator/denominator where `where` holds, else 0, without ever dividing by zero there."""
    return torch.where(where, numerator / torch.where(where, denominator, 1), 0)
