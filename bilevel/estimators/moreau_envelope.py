"""The hypergradient by the Moreau envelope of the inner problem: MEHA."""

from typing import Any, final

from bilevel.checks import check_integer, check_number
from bilevel.estimators.base import Estimator
from bilevel.estimators.further_run import FurtherRun
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult


@final
class MoreauEnvelope(Estimator):
    """`Penalty` on g − v_γ with v_γ(θ, φ) = min_θ' g(θ', φ) + ‖θ' − θ‖²/2γ for the value function:

        dF/dφ ≈ ∂_φF(θ) + λ[∂_φ g(θ) − ∂_φ g(θ')]

    From (θ_stop, s_stop) both go on for `steps` steps of the inner optimizer, side by side:

        θ' on ∇g(θ') + (θ' − θ)/γ,      θ on ∇F(θ)/λ + ∇g(θ) − (θ − θ')/γ.

    Nothing is asked for but a stationary point near θ_stop: with γ < 1/ρ the minimum in v_γ is
    unique for any inner loss that ρ/2·‖θ‖² makes convex, where min g is that of another valley.
    Cost and memory are those of `Penalty`.

    Exact for: a converged run, as λ and `steps` grow. The bias is O(1/λ), on a quadratic as that of
    `Penalty` with γH²(I + γH)⁻¹ for H: the larger γ, the nearer to it. Not for: what `Penalty` is
    not for.

    Args:
        penalty: λ > 0; 1/c in the paper.
        gamma: γ > 0; the inner optimizer also has to be stable on a curvature of 1/γ more.
        steps: K ≥ 1.
        batches: As of `Penalty`.

    Raises:
        ConfigurationError: An argument outside its range; in a call, fewer steps than `batches`.

    Source: Liu, Liu, Yao, Zeng and Zhang (MEHA), ICML 2024, algorithm 1.
    """

    uses_second_derivatives = False
    repeats_outer_loss = True
    uses_step_losses = False
    differentiates_optimizer = False
    leaves_out = "the run is taken to have converged, and the penalty is finite"

    def __init__(
        self, penalty: float = 100.0, gamma: float = 10.0, steps: int = 100, *, batches: int = 1
    ) -> None:
        self.penalty = check_number("penalty", penalty, above=0)
        self.gamma = check_number("gamma", gamma, above=0)
        self.steps = check_integer("steps", steps)
        self.batches = check_integer("batches", batches)

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        run = FurtherRun(trajectory, outer_batch, self.steps)
        upper = lower = run.start
        for inputs in run:
            apart = (upper.params - lower.params) / self.gamma
            pull = run.outer_gradient(upper.params) / self.penalty
            along = run.inner_gradient(upper.params, inputs) - apart + pull
            back = run.inner_gradient(lower.params, inputs) - apart
            upper, lower = run.step(upper, along, inputs), run.step(lower, back, inputs)
        return run.result(upper.params, lower.params, self.penalty, batches=self.batches)
