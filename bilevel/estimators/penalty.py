"""The hypergradient by a penalty on the inner optimality gap: F²SA, PBGD."""

from typing import Any, final

from bilevel.checks import check_integer, check_number
from bilevel.estimators.base import Estimator
from bilevel.estimators.further_run import FurtherRun
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult


@final
class Penalty(Estimator):
    """The gradient of min_θ F(θ, φ) + λ[g(θ, φ) − min_θ' g(θ', φ)], by first derivatives:

        dF/dφ ≈ ∂_φF(θ_λ) + λ[∂_φ g(θ_λ) − ∂_φ g(θ*)],      θ_λ ≈ argmin F/λ + g,   θ* ≈ argmin g

    where g is the inner loss and φ reaches it through the batch. Both points are made from
    (θ_stop, s_stop) by `steps` further steps of the inner optimizer on the same batches, one on
    ∇g + ∇F/λ, one on ∇g. What the run itself still has to go is common to both, so their difference
    is λ⁻¹ times `steps` terms of the Neumann series of the inverse Hessian. It costs 2·steps inner
    gradients and steps outer ones; memory is that of two iterates, whatever the length of the run.

    Exact for: a run of SGD, as λ and `steps` grow; its own weight decay counts as part of g. The
    bias is O(1/λ): where F has curvature C and g has H, (H + C/λ)⁻¹ stands for H⁻¹, relatively
    ‖C‖/(λ·λ_min(H)). Rounding adds about λ times the rounding unit, so in float32 about 1e3 is
    best, in float64 1e4 to 1e7. Not for: short runs, a learned initialisation or learning rate (an
    optimum depends on neither), Adam and its kin, which divide the small pull of F/λ by second
    moments of the run before.

    Args:
        penalty: λ > 0, in units of F over g.
        steps: K ≥ 1; as many as the inner run needs to converge. `stats.solver.residual` says how
            far they came, and above 0.1 the status.
        batches: g is the mean over the batches of so many last steps; see `Implicit`.

    Raises:
        ConfigurationError: An argument outside its range; in a call, fewer steps than `batches`.

    Source: Kwon et al. (F²SA), arXiv 2301.10945; Shen and Chen (PBGD), arXiv 2302.05185.
    """

    uses_second_derivatives = False
    repeats_outer_loss = True
    uses_step_losses = False
    differentiates_optimizer = False
    leaves_out = "the run is taken to have converged, and the penalty is finite"

    def __init__(self, penalty: float = 100.0, steps: int = 100, *, batches: int = 1) -> None:
        self.penalty = check_number("penalty", penalty, above=0)
        self.steps = check_integer("steps", steps)
        self.batches = check_integer("batches", batches)

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        run = FurtherRun(trajectory, outer_batch, self.steps)
        upper = lower = run.start
        for inputs in run:
            pull = run.outer_gradient(upper.params) / self.penalty
            upper = run.step(upper, run.inner_gradient(upper.params, inputs) + pull, inputs)
            lower = run.step(lower, run.inner_gradient(lower.params, inputs), inputs)
        return run.result(upper.params, lower.params, self.penalty, batches=self.batches)
