"""The inner run past θ_stop on other losses than its own: what value-function methods share."""

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor

from bilevel.estimators.base import WindowEnd, make_result
from bilevel.estimators.implicit import last_inputs
from bilevel.recording.outer_gradient import OuterGradient, outer_loss_slope, outer_loss_value
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult, SolverStats
from bilevel.tree import detach, needs_gradient, partition
from bilevel.variables import Iterate, StepInputs

#: A relative residual above which a further run has not come to rest.
NOTABLE_RESIDUAL = 0.1


@final
class FurtherRun:
    """A run that goes on from (θ_stop, s_stop), by first derivatives alone.

    Its steps see again what the last steps of the run saw, as often as need be.

    Args:
        trajectory: The recorded run; its window ends where this one begins.
        outer_batch: As of an estimator.
        steps: K.

    Attributes:
        start: (θ_stop, s_stop).
    """

    def __init__(self, trajectory: Trajectory, outer_batch: Any, steps: int) -> None:
        self._trajectory, self._outer_batch, self._steps = trajectory, outer_batch, steps
        self._outer = detach(trajectory.variables.tree)
        self.start = trajectory.iterate_at(trajectory.window.stop)

    def __iter__(self) -> Iterator[StepInputs]:
        """What each of the K steps takes of φ."""
        stop = self._trajectory.window.stop
        first = max(0, stop - self._steps)
        for step in range(self._steps):
            yield detach(self._trajectory.inputs_at(first + step % (stop - first)))

    def inner_gradient(self, params: Tensor, inputs: StepInputs) -> Tensor:
        """∇_θ g, the gradient of the inner loss on the batch of a step."""
        return self._trajectory.inner.gradient_without_graph(params, inputs.batch)[0]

    def outer_gradient(self, params: Tensor) -> Tensor:
        """∂F/∂θ."""
        return outer_loss_slope(self._trajectory.inner, params, self._outer, self._outer_batch)

    @torch.no_grad()
    def step(self, iterate: Iterate, gradient: Tensor, inputs: StepInputs) -> Iterate:
        """The inner optimizer's step with any gradient."""
        return self._trajectory.inner.update(iterate, gradient, inputs.hyperparameters)

    def result(
        self, upper: Tensor, lower: Tensor, penalty: float, *, batches: int
    ) -> HypergradientResult:
        """∂_φF(upper) + λ[∂_φ g(upper) − ∂_φ g(lower)], with F and θ of the end of the run.

        Where a method is at rest, ∂_θF(upper) + λ[∇_θ g(upper) − ∇_θ g(lower)] = 0; what is left of
        that, relative to ‖∂_θF‖, is `stats.solver.residual`.

        Args:
            upper: θ of the run that F has a part in.
            lower: θ of the one that F has none in.
            penalty: λ.
            batches: g is the mean inner loss over the batches of so many last steps.
        """
        trajectory, inner = self._trajectory, self._trajectory.inner
        gradient = OuterGradient(trajectory, twice=False)
        _, _, slope = gradient.outer_loss_at(upper, self._outer_batch)
        inputs = [inputs.batch for inputs in last_inputs(trajectory, batches)]
        leaves, rebuild = partition(inputs, needs_gradient)

        def slopes(params: Tensor) -> tuple[Tensor, ...]:
            """(∇_θ g, ∂g/∂b leaf by leaf)."""
            at = [leaf.detach().requires_grad_() for leaf in (params, *leaves)]
            with torch.enable_grad():
                losses = [inner.loss(at[0], batch) for batch in rebuild(at[1:])]
                return torch.autograd.grad(torch.stack(losses).mean(), at, materialize_grads=True)

        rest, *mixed = (
            penalty * (above - below)
            for above, below in zip(slopes(upper), slopes(lower), strict=True)
        )
        gradient.pull(leaves, mixed)
        size = torch.linalg.vector_norm(slope)
        residual = float(torch.linalg.vector_norm(slope + rest) / torch.where(size > 0, size, 1))
        status = "converged"
        if not residual <= NOTABLE_RESIDUAL:
            status = (
                f"the further run is not at rest: a relative residual of {residual:.2g} after "
                f"{self._steps} steps; raise steps, or lower the inner learning rate"
            )
        params = self.start.params
        loss, metrics = outer_loss_value(inner, params, self._outer, self._outer_batch)
        return make_result(
            trajectory,
            WindowEnd(gradient, self.start, loss, metrics, torch.zeros_like(params)),
            hessian_vector_products=0,
            remarks=[] if status == "converged" else [status],
            solver=SolverStats(status, self._steps, residual),
            penalty=penalty,
        )
