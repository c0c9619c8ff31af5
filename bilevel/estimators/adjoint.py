"""The exact hypergradient by the adjoint recursion, one step's graph at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.estimators.base import Estimator, make_result
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate, Trajectory
from bilevel.tree import detach, is_differentiable, partition


@final
class Adjoint(Estimator):
    """Exact, and the default: what autograd gives through the whole window, in flat memory.

    From λ = ∂F/∂θ_stop and μ = 0, for t = stop−1 … start:

        λ', μ', ḡ, h̄ = VJP of the optimizer step Φ at (θ_t, s_t, g_t, h), applied to (λ, μ)
        (H_t ḡ, b̄)   = ∇_{θ,b} ⟨∇_θ ℓ(θ_t, b_t), ḡ⟩
        λ ← λ' + H_t ḡ,   μ ← μ',   φ̄ ← φ̄ + (∂b_t/∂φ)ᵀ b̄,   h̄ summed

    with φ̄ starting at ∂F/∂φ, and (∂θ_0/∂φ)ᵀ λ added when start = 0. Memory: the kept iterates
    plus the graph of one step, whatever the width of the window.

    Args:
        hvp: How H_t ḡ and the mixed product are computed, together. "reverse": reverse mode over
            reverse mode, one gradient evaluation fewer and usually faster. "forward": forward mode
            over reverse mode, with less memory for the step; the inner loss may then use only
            operations that have a forward derivative (not `mse_loss(reduction="mean")`, `cdist`,
            or fused attention).

    Exact for: any window, any number of outer variables. Not for: inner losses without a second
    derivative (use finite differences), or very long windows near a converged inner problem, where
    an implicit estimator costs less.

    Raises:
        ConfigurationError: `hvp` is neither.
    """

    def __init__(self, hvp: Literal["reverse", "forward"] = "reverse") -> None:
        if hvp not in ("reverse", "forward"):
            raise ConfigurationError(f"hvp={hvp!r}: it must be 'reverse' or 'forward'")
        self.hvp = hvp

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
            cotangent, state_cotangents, batch_cotangents, step_hyper_cotangents = inner.run(
                self._adjoint_step,
                inner,
                iterate.params,
                iterate.state,
                batch,
                constants,
                cotangent,
                state_cotangents,
            )
            variables.accumulate(partition(batch, _needs_gradient)[0], batch_cotangents)
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
            hessian_vector_products=window.width,
            cotangent_norms=torch.stack(norms[::-1]),
        )

    def _adjoint_step(
        self,
        inner: InnerLoop,
        params: Tensor,
        state: Any,
        batch: Any,
        hyperparameters: Mapping[str, Tensor],
        cotangent: Tensor,
        state_cotangents: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor], dict[str, Tensor]]:
        """(λ, μ, b̄, h̄) one step earlier."""
        linearise = _reverse_over_reverse if self.hvp == "reverse" else _forward_over_reverse
        gradient, pull_gradient = linearise(inner, params, batch)
        state_leaves, rebuild_state = partition(state)

        def update(
            params: Tensor,
            state_leaves: list[Tensor],
            gradient: Tensor,
            hyperparameters: Mapping[str, Tensor],
        ) -> tuple[Tensor, list[Tensor]]:
            after = inner.update(
                Iterate(params, rebuild_state(state_leaves)), gradient, hyperparameters
            )
            return after.params, partition(after.state)[0]

        _, pull_update, *_ = torch.func.vjp(
            update, params, state_leaves, gradient, dict(hyperparameters)
        )
        through_update, state_cotangents, gradient_cotangent, hyper_cotangents = pull_update(
            (cotangent, state_cotangents)
        )
        product, *batch_cotangents = pull_gradient(gradient_cotangent)
        return through_update + product, state_cotangents, batch_cotangents, hyper_cotangents


#: From ḡ to (H ḡ, b̄).
Pullback = Callable[[Tensor], Sequence[Tensor]]


def _reverse_over_reverse(inner: InnerLoop, params: Tensor, batch: Any) -> tuple[Tensor, Pullback]:
    """∇_θ ℓ and its pullback, by autograd over autograd.

    In eager mode this beats `torch.func.vjp(torch.func.grad(…))`, which cannot use the fused
    first-order kernels, nor add gradients up in place.
    """
    inputs, rebuild = partition(batch, _needs_gradient)
    points = [leaf.detach().requires_grad_() for leaf in (params, *inputs)]
    with torch.enable_grad():
        loss = inner.loss(points[0], rebuild(points[1:]))
        gradient = torch.zeros_like(params)
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(
                loss, points[0], create_graph=True, materialize_grads=True
            )

    def pull(direction: Tensor) -> Sequence[Tensor]:
        if not gradient.requires_grad:
            return [torch.zeros_like(point) for point in points]
        return torch.autograd.grad(gradient, points, direction, materialize_grads=True)

    return gradient.detach(), pull


def _forward_over_reverse(inner: InnerLoop, params: Tensor, batch: Any) -> tuple[Tensor, Pullback]:
    """∇_θ ℓ and its pullback, by a directional derivative of (∇_θ ℓ, ∇_b ℓ)."""
    inputs, rebuild = partition(batch, _needs_gradient)
    inputs = [leaf.detach() for leaf in inputs]

    def gradients(params: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(
            lambda params, inputs: inner.loss(params, rebuild(inputs)), argnums=(0, 1)
        )(params, inputs)

    def pull(direction: Tensor) -> Sequence[Tensor]:
        tangents = (direction, *(torch.zeros_like(leaf) for leaf in inputs))
        product, mixed = torch.func.jvp(gradients, (params, *inputs), tangents)[1]
        return product, *mixed

    return inner.gradient_without_graph(params, rebuild(inputs))[0], pull


def _needs_gradient(leaf: Any) -> bool:
    return is_differentiable(leaf) and leaf.requires_grad
