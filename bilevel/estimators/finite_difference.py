"""The adjoint recursion with differences of first derivatives in place of second derivatives."""

from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_number
from bilevel.estimators.base import Estimator
from bilevel.estimators.recursion import BackwardRecursion, WindowEnd, pull_update
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import needs_gradient, partition


@final
class FiniteDifference(Estimator):
    """`Adjoint` without second derivatives of the inner loss: with ḡ from the optimizer's VJP,

        (H ḡ, b̄) ≈ [∇_{θ,b} ℓ(θ + εḡ, b) − ∇_{θ,b} ℓ(θ − εḡ, b)] / 2ε,      ε = radius/‖ḡ‖₂

    which takes two first-order gradients a step. With `truncation=Last(1)` and SGD this is the
    one-step approximation of DARTS; with Adam, whose VJP is then a diagonal preconditioner of
    ∂F/∂θ, that of SAMA. Wider windows unroll further. The optimizer itself is differentiated once,
    exactly, and so are the batch and the outer loss.

    The error is O(radius²) from curvature of the gradient, plus the rounding unit over `radius`:
    for smooth inner losses. Not for ReLU networks, whose gradient jumps between the two points:
    there its direction has little to do with the true one. Not for anything with second
    derivatives, where `Adjoint` is exact and no slower.

    Args:
        radius: ‖θ± − θ‖₂, above 0. In float64 1e-4 is about best, in float32 1e-2.

    Raises:
        ConfigurationError: `radius` is not above 0.

    Source: Liu, Simonyan and Yang (DARTS), arXiv 1806.09055, equations 7 and 8; Choe et al. (SAMA),
    arXiv 2310.05674, equation 5.
    """

    uses_second_derivatives = False
    leaves_out = "differences of first derivatives stand for second ones"

    def __init__(self, radius: float = 1e-2) -> None:
        self.radius = check_number("radius", radius, above=0)

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        inner = trajectory.inner
        end = WindowEnd.of(trajectory, outer_batch, twice=False)
        recursion = BackwardRecursion(trajectory, end)
        for step, iterate, inputs in recursion.steps():
            gradient, loss = inner.gradient_without_graph(iterate.params, inputs.batch)
            through_update, state_cotangents, direction, hyper_cotangents = pull_update(
                inner,
                iterate.params,
                iterate.state,
                gradient,
                inputs.hyperparameters,
                recursion.cotangent,
                recursion.state_cotangents,
            )
            product, batch_cotangents = self._differences(
                inner, iterate.params, inputs.batch, direction
            )
            end.gradient.pull(
                partition(inputs, needs_gradient)[0], [*batch_cotangents, *hyper_cotangents]
            )
            recursion.step_back(step, through_update + product, state_cotangents, loss=loss)
        return recursion.result(hessian_vector_products=0)

    def _differences(
        self, inner: InnerLoop, params: Tensor, batch: Any, direction: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """(H ḡ, b̄) by central differences."""
        inputs, rebuild = partition(batch, needs_gradient)
        size = torch.linalg.vector_norm(direction)
        distance = self.radius / torch.where(size > 0, size, 1)

        def gradients(params: Tensor) -> tuple[Tensor, ...]:
            points = [leaf.detach().requires_grad_() for leaf in (params, *inputs)]
            with torch.enable_grad():
                value = inner.loss(points[0], rebuild(points[1:]))
            if not value.requires_grad:
                return tuple(torch.zeros_like(point) for point in points)
            return torch.autograd.grad(value, points, materialize_grads=True)

        above = gradients(params + distance * direction)
        below = gradients(params - distance * direction)
        product, *mixed = ((a - b) / (2 * distance) for a, b in zip(above, below, strict=True))
        return product, mixed
