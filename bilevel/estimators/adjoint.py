"""The exact hypergradient by the adjoint recursion, one step's graph at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.checks import check_choice
from bilevel.estimators.base import Estimator
from bilevel.estimators.inner_hessian import InnerHessian
from bilevel.estimators.recursion import BackwardRecursion, WindowEnd, pull_update
from bilevel.inner import InnerLoop
from bilevel.result import HypergradientResult
from bilevel.trajectory import Trajectory
from bilevel.tree import needs_gradient, partition


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
        self.hvp = check_choice("hvp", hvp, ("reverse", "forward"))

    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        end = WindowEnd.of(inner, trajectory, outer, outer_batch)
        return self.through_window(inner, trajectory, outer, end)

    def through_window(
        self,
        inner: InnerLoop,
        trajectory: Trajectory,
        outer: Any,
        end: WindowEnd,
        *,
        products_before: int = 0,
        remarks: Sequence[str] = (),
        **stats: Any,
    ) -> HypergradientResult:
        """The recursion from the end of the window, for estimators that fall back on it.

        Args:
            inner: The inner loop.
            trajectory: The recorded run and its window.
            outer: φ.
            end: The end of the window; its outer variables are used up.
            products_before: Hessian-vector products that were already taken.
            remarks: As of `make_result`.
            **stats: As of `make_result`.
        """
        recursion = BackwardRecursion(inner, trajectory, outer, end)
        for step, iterate in recursion.steps():
            batch, inputs = recursion.batch(step)
            cotangent, state_cotangents, batch_cotangents, hyper_cotangents = inner.run(
                self._adjoint_step,
                inner,
                iterate.params,
                iterate.state,
                batch,
                recursion.hyperparameters,
                recursion.cotangent,
                recursion.state_cotangents,
            )
            recursion.accumulate(inputs, batch_cotangents)
            recursion.step_back(cotangent, state_cotangents, hyper_cotangents)
        return recursion.result(
            hessian_vector_products=products_before + trajectory.window.width,
            remarks=remarks,
            **stats,
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
        through_update, state_cotangents, gradient_cotangent, hyper_cotangents = pull_update(
            inner, params, state, gradient, hyperparameters, cotangent, state_cotangents
        )
        product, *batch_cotangents = pull_gradient(gradient_cotangent)
        return through_update + product, state_cotangents, batch_cotangents, hyper_cotangents


#: From ḡ to (H ḡ, b̄).
Pullback = Callable[[Tensor], Sequence[Tensor]]


def _reverse_over_reverse(inner: InnerLoop, params: Tensor, batch: Any) -> tuple[Tensor, Pullback]:
    """∇_θ ℓ and its pullback, by autograd over autograd."""
    hessian = InnerHessian(inner, params, batch)
    return hessian.gradient, hessian.with_mixed


def _forward_over_reverse(inner: InnerLoop, params: Tensor, batch: Any) -> tuple[Tensor, Pullback]:
    """∇_θ ℓ and its pullback, by a directional derivative of (∇_θ ℓ, ∇_b ℓ)."""
    inputs, rebuild = partition(batch, needs_gradient)
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
