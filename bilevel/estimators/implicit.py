"""Implicit differentiation of a converged inner problem."""

from collections.abc import Mapping
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.checks import check_flag, check_instance, check_integer, check_number
from bilevel.errors import ConfigurationError
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.estimators.mean_hessian import MeanHessian
from bilevel.linear import ConjugateGradient, LinearOperator, Solution, Solver
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult, SolverStats
from bilevel.tree import needs_gradient, partition
from bilevel.variables import StepInputs

#: Beyond this part of |F|, `outer_loss_gap` is worth a sentence in the status.
NOTABLE_GAP = 0.1


@final
class Implicit(Estimator):
    """The hypergradient at an inner optimum, without looking at how the run got there:

        dF/dφ = ∂F/∂φ − (∂b/∂φ)ᵀ ∂_b⟨∇_θ ℓ(θ, b), x⟩,      (H + damping·I) x = ∂F/∂θ

    at θ = θ_stop with H = ∇²_θ ℓ(θ, b). Time and memory do not depend on the length of the run: the
    graph of one inner gradient, and what the solver keeps. Where the window starts does not matter.

    Exact for: a run that ends where ∇_θ ℓ = 0, with an exact solver and no damping. Not for: short
    runs (the error is of the order of ‖∇_θ ℓ(θ_stop)‖; `stats.outer_loss_gap` tells it in units of
    the outer loss, and the status says so above 10 % of it), a learned initialisation or learning
    rate (an optimum depends on neither: their gradient is zero, and the status says so), an
    optimizer with weight decay of its own (its fixed point is no zero of ∇_θ ℓ: put the penalty
    into the inner loss, or use `FixedPoint`).

    The inner objective is the mean of the inner loss over the batches of the last `batches` steps
    before θ_stop. For a problem whose batch is the same at every step that is the inner objective
    itself. For random mini-batches it is a sample of it: its Hessian and its mixed derivative use
    the same batches, but the inverse of a sample's Hessian is not unbiased, and batches that the
    run has just seen are fitted a little better than others, so take enough of them.

    Args:
        solver: Default: `ConjugateGradient()`.
        damping: ρ ≥ 0, added to the diagonal of the Hessian. It biases the result towards that of
            fewer inner steps and makes singular or slightly indefinite Hessians solvable.
        batches: How many steps' batches the inner objective is averaged over, at least 1. The
            graph of each is in memory.
        warm_start: Start the solver at the previous call's solution; for outer steps that end near
            the same θ, not for a fresh network each time. Part of `state_dict`.
        tasks: Number of independent inner problems that are trained side by side: every leaf of
            the parameters has a leading dimension of this size, and `inner_loss` is a sum over it.
            Each gets its own iterations and its own verdict in one batched solve. None: one.

    Raises:
        ConfigurationError: An argument that cannot work; in a call, fewer steps than `batches`, or
            parameters without the dimension of the tasks.
        SolverError: (in a call) The solver found no solution.

    Warns:
        ConvergenceWarning: (in a call) The solver stopped short of its tolerance.

    Source: Larsen et al. 1996; Bengio, Neural Computation 12 (2000), equation 8; for networks,
    Lorraine, Vicol and Duvenaud, arXiv 1911.02590; for many tasks, Rajeswaran et al.,
    arXiv 1909.04630.
    """

    uses_step_losses = False
    leaves_out = "the run is taken to have converged, so how it got there does not count"
    differentiates_optimizer = False

    def __init__(
        self,
        solver: Solver | None = None,
        *,
        damping: float = 0.0,
        batches: int = 1,
        warm_start: bool = False,
        tasks: int | None = None,
    ) -> None:
        solver = ConjugateGradient() if solver is None else solver
        self.solver = check_instance("solver", solver, Solver, "bilevel.linear.ConjugateGradient()")
        self.warm_start = check_flag("warm_start", warm_start)
        if warm_start and not self.solver.uses_start:
            raise ConfigurationError(
                f"warm_start=True: {type(self.solver).__name__} does not iterate from a start"
            )
        self.damping = check_number("damping", damping, minimum=0)
        self.batches = check_integer("batches", batches)
        self.tasks = None if tasks is None else check_integer("tasks", tasks)
        if self.warm_start:
            self.carries_over = "the solution of its linear system (warm_start=True)"
        self._solution: Tensor | None = None

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        inner, end = trajectory.inner, WindowEnd.of(trajectory, outer_batch)
        batches = [inputs.batch for inputs in last_inputs(trajectory, self.batches)]
        leaves = partition(batches, needs_gradient)[0]
        hessian = MeanHessian(inner, end.iterate.params, batches)
        solution, x = self._solve(hessian, end.cotangent, trajectory)
        gradient, mixed = hessian.mixed(-x)
        end.gradient.pull(leaves, mixed)
        gap = -(x @ gradient)
        return make_result(
            trajectory,
            end,
            hessian_vector_products=solution.products,
            remarks=remarks(solution, gap, end.loss),
            solver=solver_stats(solution),
            outer_loss_gap=gap,
        )

    def _solve(
        self, hessian: MeanHessian, slope: Tensor, trajectory: Trajectory
    ) -> tuple[Solution, Tensor]:
        """(the solution, x as one flat vector)."""
        start = self._solution if self.warm_start else None
        if start is not None and start.shape != slope.shape:
            raise ConfigurationError(
                f"warm_start=True: the previous solution has {start.numel()} entries, this inner "
                f"problem {slope.numel()} parameters: use an estimator of its own for each"
            )
        operator: LinearOperator = hessian
        blocks = None
        if self.tasks is not None:
            operator = blocks = _TaskBlocks(hessian, slope, trajectory.inner, self.tasks)
        solution = self.solver.solve(
            operator,
            slope if blocks is None else blocks.split(slope),
            damping=self.damping,
            start=start if start is None or blocks is None else blocks.split(start.to(slope)),
            generator=trajectory.key.generator("solver", device=slope.device),
        )
        x = solution.x if blocks is None else blocks.join(solution.x)
        if self.warm_start and bool(torch.isfinite(x).all()):
            self._solution = x
        return solution, x

    def state_dict(self) -> dict[str, Any]:
        """The solution to start from next, flat, if there is one."""
        return {} if self._solution is None else {"solution": self._solution}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) - {"solution"} or (state and not self.warm_start):
            raise ConfigurationError(
                f"Implicit(warm_start={self.warm_start}) cannot continue from a state with "
                f"{sorted(state)}"
            )
        self._solution = state.get("solution")


@final
class _TaskBlocks(LinearOperator):
    """A Hessian that is block-diagonal over tasks, as a batch of one matrix a task."""

    def __init__(self, hessian: MeanHessian, params: Tensor, inner: InnerLoop, tasks: int) -> None:
        self._hessian, self._inner, self._tasks = hessian, inner, tasks
        leaves = optree.tree_leaves(inner.unravel(params))
        for leaf in leaves:
            if leaf.dim() == 0 or len(leaf) != tasks:
                raise ConfigurationError(
                    f"tasks={tasks}: a leaf of the parameters has shape {tuple(leaf.shape)}; the "
                    "first dimension of each must be the number of tasks"
                )
        self._widths = [leaf.numel() // tasks for leaf in leaves]
        super().__init__(self.split(params), symmetric=True)

    def product(self, vector: Tensor) -> Tensor:
        return self.split(self._hessian.product(self.join(vector)))

    def split(self, flat: Tensor) -> Tensor:
        """A flat vector, one row a task."""
        leaves = optree.tree_leaves(self._inner.unravel(flat))
        return torch.cat([leaf.reshape(self._tasks, -1) for leaf in leaves], dim=1)

    def join(self, rows: Tensor) -> Tensor:
        """The flat vector with these rows."""
        return torch.cat([leaf.reshape(-1) for leaf in rows.split(self._widths, dim=1)])


def last_inputs(trajectory: Trajectory, count: int) -> list[StepInputs]:
    """What the `count` steps before θ_stop take of φ, on its graph."""
    stop = trajectory.window.stop
    if count > stop:
        raise ConfigurationError(
            f"batches={count}: there are only {stop} inner steps before the end of the window"
        )
    return [trajectory.inputs_at(step) for step in range(stop - count, stop)]


def remarks(solution: Solution, gap: Tensor, loss: Tensor) -> list[str]:
    """What the status should say of a solution, and of how far the run is from converged."""
    found = [] if solution.converged else [solution.status]
    if float(gap.abs()) > NOTABLE_GAP * float(loss.abs()):
        found.append(
            f"the inner run has not converged: the outer loss of {float(loss):.3g} would change by "
            f"about {float(gap):.2g} if it went on, so this is the derivative at another point"
        )
    return found


def solver_stats(solution: Solution) -> SolverStats:
    """The worst over all tasks."""
    return SolverStats(
        solution.status, int(solution.iterations.max()), float(solution.residual.max())
    )
