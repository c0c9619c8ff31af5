"""The adjoint recursion with differences of first derivatives in place of second derivatives."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_positive
from bilevel.estimators.base import Estimator, make_result
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate, Trajectory
from bilevel.tree import detach, needs_gradient, partition


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

    def __init__(self, radius: float = 1e-2) -> None:
        self.radius = check_positive("radius", radius)

    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        window = trajectory.window
        variables = OuterVariables(outer)
        stop = inner.iterate_at(trajectory, outer, window.stop)
        loss, metrics, cotangent = variables.outer_loss_at(inner, stop.params, outer_batch)
        state_cotangents = [torch.zeros_like(leaf) for leaf in partition(stop.state)[0]]

        with torch.enable_grad():
            hyperparameters = inner.hyperparameters(variables.tree)
        constants = detach(hyperparameters)
        hyper_cotangents = {name: torch.zeros_like(value) for name, value in constants.items()}
        norms = [torch.linalg.vector_norm(cotangent)]
        for step, iterate in inner.iterates_backward(trajectory, outer):
            with torch.enable_grad():
                batch = inner.batch(variables.tree, step, trajectory.key)
            through_update, state_cotangents, direction, step_hyper_cotangents = _pull_update(
                inner, iterate, batch, constants, cotangent, state_cotangents
            )
            product, batch_cotangents = self._differences(inner, iterate.params, batch, direction)
            cotangent = through_update + product
            variables.accumulate(partition(batch, needs_gradient)[0], batch_cotangents)
            for name, value in step_hyper_cotangents.items():
                hyper_cotangents[name] = hyper_cotangents[name] + value
            norms.append(torch.linalg.vector_norm(cotangent))

        variables.accumulate(list(hyperparameters.values()), list(hyper_cotangents.values()))
        if window.start == 0:
            with torch.enable_grad():
                start = inner.start(
                    variables.tree, trajectory.key, inner.hyperparameters(variables.tree)
                )
            variables.accumulate(
                [start.params, *partition(start.state)[0]], [cotangent, *state_cotangents]
            )
        return make_result(
            inner,
            trajectory,
            variables,
            loss=loss,
            metrics=metrics,
            stop_params=stop.params,
            hessian_vector_products=0,
            cotangent_norms=torch.stack(norms[::-1]),
        )

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


def _pull_update(
    inner: InnerLoop,
    iterate: Iterate,
    batch: Any,
    hyperparameters: Mapping[str, Tensor],
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
    """The VJP of the optimizer's step: (λ', μ', ḡ, h̄)."""
    gradient, _ = inner.gradient_without_graph(iterate.params, batch)
    state_leaves, rebuild_state = partition(iterate.state)

    def update(
        params: Tensor, state: list[Tensor], gradient: Tensor, hyperparameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        here = Iterate(params, rebuild_state(state))
        after = inner.update(here, gradient, hyperparameters)
        return after.params, partition(after.state)[0]

    _, pull, *_ = torch.func.vjp(
        update, iterate.params, state_leaves, gradient, dict(hyperparameters)
    )
    pulled: tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]] = pull(
        (cotangent, state_cotangents)
    )
    return pulled
