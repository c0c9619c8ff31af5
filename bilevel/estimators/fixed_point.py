"""Implicit differentiation of the fixed point of the inner optimizer's own step."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_instance, check_integer
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.estimators.implicit import last_inputs, remarks, solver_stats
from bilevel.linear import LinearOperator, Neumann, Solver
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import needs_gradient, partition
from bilevel.variables import Iterate


@final
class FixedPoint(Estimator):
    """The hypergradient where the whole inner step u ↦ Φ(u, φ) has come to rest, u = (θ, s):

        dF/dφ = ∂F/∂φ + (∂Φ/∂φ)ᵀ w,      (I − ∂Φ/∂u)ᵀ w = (∂F/∂θ, 0)

    at u = (θ_stop, s_stop), where φ reaches Φ through the batch and through the optimizer's
    hyperparameters. Nothing is assumed of Φ but that it contracts near its fixed point: it holds
    for momentum and for weight decay inside the optimizer, where `Implicit` does not, and for any
    problem whose "gradient" is no gradient. K terms of the Neumann series are K unrolled steps that
    stand still at u_stop. Time and memory do not depend on the length of the run.

    Exact for: a run that has come to rest, with an exact solver. Not for: short runs (see
    `stats.outer_loss_gap`), a learned initialisation, or optimizers whose step is no contraction
    where the gradient vanishes (Adam, RMSProp, Adagrad: their denominators vanish with it).

    Args:
        solver: `Neumann` with a step size of 1, `GMRES` or `Dense`; the matrix is not symmetric.
            Default: `Neumann(1.0)`.
        batches: Φ is averaged over the batches of the last so many steps; see `Implicit`.

    Raises:
        ConfigurationError: An argument that cannot work; in a call, a solver for symmetric
            matrices, or fewer steps than `batches`.
        SolverError: (in a call) The series diverges, or the matrix is singular.

    Warns:
        ConvergenceWarning: (in a call) The solver stopped short of its tolerance.

    Source: Christianson, Optim. Methods Softw. 3 (1994), 311–326; Grazzi et al., arXiv 2006.16218.
    """

    uses_step_losses = False
    leaves_out = "the run is taken to have converged, so how it got there does not count"

    def __init__(self, solver: Solver | None = None, *, batches: int = 1) -> None:
        solver = Neumann(1.0) if solver is None else solver
        self.solver = check_instance("solver", solver, Solver, "bilevel.linear.Neumann(1.0)")
        self.batches = check_integer("batches", batches)

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        inner, end = trajectory.inner, WindowEnd.of(trajectory, outer_batch)
        leaves, rebuild = partition(last_inputs(trajectory, self.batches), needs_gradient)
        flatten, unflatten = _as_one_vector(end.iterate)

        def step(point: Tensor, leaves: list[Tensor]) -> Tensor:
            here = unflatten(point)
            ends = [inner.step(here, inputs) for inputs in rebuild(leaves)]
            return torch.stack([flatten(after) for after in ends]).mean(0)

        point = flatten(end.iterate)
        after, pull, *_ = torch.func.vjp(step, point, [leaf.detach() for leaf in leaves])
        operator = _OneMinusTransposedJacobian(point, pull)
        rhs = torch.cat([end.cotangent, point.new_zeros(len(point) - len(end.cotangent))])
        generator = trajectory.key.generator("solver", device=rhs.device)
        solution = self.solver.solve(operator, rhs, generator=generator)
        with torch.no_grad():
            _, cotangents = pull(solution.x)
        end.gradient.pull(leaves, cotangents)
        gap = solution.x @ (after.detach() - point)
        return make_result(
            trajectory,
            end,
            hessian_vector_products=(solution.products + 1) * self.batches,
            remarks=remarks(solution, gap, end.loss),
            solver=solver_stats(solution),
            outer_loss_gap=gap,
        )


@final
class _OneMinusTransposedJacobian(LinearOperator):
    """w ↦ w − (∂Φ/∂u)ᵀw."""

    def __init__(self, point: Tensor, pull: Callable[[Tensor], tuple[Any, ...]]) -> None:
        super().__init__(point, symmetric=False)
        self._pull = pull

    def product(self, vector: Tensor) -> Tensor:
        return vector - self._pull(vector)[0]


def _as_one_vector(
    like: Iterate,
) -> tuple[Callable[[Iterate], Tensor], Callable[[Tensor], Iterate]]:
    """Functions from (θ, every floating-point leaf of s) to one vector of θ's dtype, and back.

    Other leaves of the state, such as a step count, stay as they are in `like`.
    """
    leaves, rebuild = partition((like.params, like.state))
    sizes = [leaf.numel() for leaf in leaves]

    def flatten(iterate: Iterate) -> Tensor:
        leaves, _ = partition((iterate.params, iterate.state))
        return torch.cat([leaf.reshape(-1).to(like.params.dtype) for leaf in leaves])

    def unflatten(vector: Tensor) -> Iterate:
        pieces = [
            piece.view(leaf.shape).to(leaf.dtype)
            for piece, leaf in zip(vector.split(sizes), leaves, strict=True)
        ]
        return Iterate(*rebuild(pieces))

    return flatten, unflatten
