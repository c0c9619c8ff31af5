"""GMRES, for any regular matrix."""

from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.linear.solver import Solver, System, divide, norm


@final
class GMRES(Solver):
    """Generalised minimal residuals: the least ‖b − Ax‖ over x in the Krylov space, one product
    an iteration.

    For any regular matrix: indefinite Hessians, and the non-symmetric matrix of a fixed point. It
    keeps `restart` vectors of length p; after as many iterations it starts anew from where it
    stands, which may stall on hard matrices where a longer cycle would not.

    Args:
        max_iterations: In all cycles together, at least 1.
        tolerance: Relative residual ‖b − (A + ρI)x‖/‖b‖ at which to stop.
        restart: The length of a cycle, at least 1.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986), 856–869; orthogonalised twice by
    classical Gram–Schmidt.
    """

    needs_symmetric = False
    uses_start = True

    def __init__(
        self, max_iterations: int = 100, tolerance: float = 1e-5, restart: int = 50
    ) -> None:
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)
        self.restart = check_integer("restart", restart)

    def _solve(self, system: System) -> tuple[Tensor, Tensor, str]:
        x = system.start
        residual = system.rhs - system.product(x) if bool(x.any()) else system.rhs
        iterations = torch.zeros_like(residual[..., 0])
        done = 0
        while done < self.max_iterations and bool((norm(residual) > self.tolerance).any()):
            length = min(self.restart, self.max_iterations - done)
            step, used = self._cycle(system, residual, length)
            x = x + step
            iterations += used
            done += length
            if done < self.max_iterations:
                residual = system.rhs - system.product(x)
        return x, iterations, ""

    def _cycle(self, system: System, residual: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(the best step within one Krylov space, iterations used).

        A system that has converged, or whose Krylov space is exhausted, goes on with zero vectors,
        which leave its solution as it is.
        """
        batch, size = residual.shape[:-1], residual.shape[-1]
        basis = residual.new_zeros(*batch, size, length + 1)
        triangle = residual.new_zeros(*batch, length, length)
        target = residual.new_zeros(*batch, length + 1)
        rotations: list[tuple[Tensor, Tensor]] = []
        left = norm(residual)[..., 0]
        active = left > self.tolerance
        basis[..., 0] = divide(residual, left[..., None], active[..., None])
        target[..., 0] = left * active
        used = torch.zeros_like(left)
        for j in range(length):
            if not bool(active.any()):
                break
            used += active
            vector = system.product(basis[..., j])
            before = norm(vector)[..., 0]
            known = basis[..., : j + 1]
            column = residual.new_zeros(*batch, j + 2)
            for _ in range(2):
                overlaps = known.mT @ vector[..., None]
                vector = vector - (known @ overlaps)[..., 0]
                column[..., : j + 1] += overlaps[..., 0]
            rest = norm(vector)[..., 0]
            # What is left after cancellation of everything is rounding, not a new direction.
            fresh = active & (rest > 100 * torch.finfo(rest.dtype).eps * before)
            column[..., j + 1] = rest * fresh
            for i, (cosine, sine) in enumerate(rotations):
                upper, lower = column[..., i], column[..., i + 1]
                rotated = cosine * upper + sine * lower, cosine * lower - sine * upper
                column[..., i], column[..., i + 1] = rotated
            radius = torch.hypot(column[..., j], column[..., j + 1])
            cosine = torch.where(radius > 0, divide(column[..., j], radius, radius > 0), 1)
            sine = divide(column[..., j + 1], radius, radius > 0)
            rotations.append((cosine, sine))
            column[..., j] = radius
            triangle[..., : j + 1, j] = column[..., : j + 1]
            last = target[..., j].clone()
            target[..., j], target[..., j + 1] = cosine * last, -sine * last
            active = fresh & (target[..., j + 1].abs() > self.tolerance)
            basis[..., j + 1] = divide(vector, rest[..., None], active[..., None])
        steps = len(rotations)
        diagonal = triangle[..., :steps, :steps].diagonal(dim1=-2, dim2=-1)
        # A zero is a system that had converged; nearly zero, a singular matrix, and dividing by it
        # would give a solution of rounding noise.
        small = 100 * torch.finfo(diagonal.dtype).eps * diagonal.abs().amax(dim=-1, keepdim=True)
        empty = diagonal.abs() <= small
        diagonal.masked_fill_(empty, 1)
        goal = torch.where(empty, 0, target[..., :steps])[..., None]
        weights = torch.linalg.solve_triangular(triangle[..., :steps, :steps], goal, upper=True)
        return (basis[..., :steps] @ weights)[..., 0], used
