"""The hypergradient by the value function of the inner problem: BOME."""

from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.estimators.base import Estimator
from bilevel.estimators.further_run import FurtherRun
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult


@final
class ValueFunction(Estimator):
    """`Penalty` whose λ is found on the way. With q(θ, φ) = g(θ, φ) − g(θ*, φ), θ* held,

        d = ∇F + λ∇q,      λ = max(0, η − ⟨∇F, ∇q⟩/‖∇q‖²)

    is the direction nearest to ∇F along which q falls at η‖∇q‖² at least. From (θ_stop, s_stop)
    θ takes `steps` further steps of the inner optimizer with d/max(1, λ), θ* as many on ∇g, and

        dF/dφ ≈ ∂_φF(θ) + λ[∂_φ g(θ) − ∂_φ g(θ*)].

    The first step has λ = 0, since there q = 0. BOME moves φ in the same step as θ, with one λ for
    both; here φ stands still meanwhile, so that d comes to rest in θ and the hypergradient is left.
    Cost and memory are those of `Penalty`.

    Exact for: a converged run, as `steps` grow: λ, in `stats.penalty`, grows in proportion to η,
    the learning rate and `steps`, and the bias is O(1/λ). Not for: what `Penalty` is not for;
    random batches, whose noise keeps ∇q from vanishing and λ from growing.

    Args:
        barrier: η > 0.
        steps: K ≥ 1.
        batches: As of `Penalty`.

    Raises:
        ConfigurationError: An argument outside its range; in a call, fewer steps than `batches`.

    Source: Ye et al. (BOME), arXiv 2209.08709, algorithm 1 with φ(q) = η‖∇q‖².
    """

    uses_second_derivatives = False
    repeats_outer_loss = True
    uses_step_losses = False
    differentiates_optimizer = False
    leaves_out = "the run is taken to have converged, and the penalty that is found is finite"

    def __init__(self, barrier: float = 1.0, steps: int = 100, *, batches: int = 1) -> None:
        self.barrier = check_number("barrier", barrier, above=0)
        self.steps = check_integer("steps", steps)
        self.batches = check_integer("batches", batches)

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        run = FurtherRun(trajectory, outer_batch, self.steps)
        upper = lower = run.start
        for step, inputs in enumerate(run):
            of_outer = run.outer_gradient(upper.params)
            of_inner = run.inner_gradient(upper.params, inputs)
            direction = of_outer
            if step:
                penalty = self._penalty(of_outer, of_inner)
                direction = (of_outer + penalty * of_inner) / penalty.clamp(min=1)
            upper = run.step(upper, direction, inputs)
            lower = run.step(lower, run.inner_gradient(lower.params, inputs), inputs)
        penalty = self._penalty(
            run.outer_gradient(upper.params), run.inner_gradient(upper.params, inputs)
        )
        return run.result(upper.params, lower.params, float(penalty), batches=self.batches)

    def _penalty(self, of_outer: Tensor, of_inner: Tensor) -> Tensor:
        """λ, a scalar; 0 where ∇q is zero."""
        square = of_inner @ of_inner
        found = self.barrier - (of_outer @ of_inner) / torch.where(square > 0, square, 1)
        return torch.where(square > 0, found.clamp(min=0), 0)
