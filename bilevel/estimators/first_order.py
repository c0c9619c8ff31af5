"""The adjoint recursion without the inner Hessian: first-order MAML."""

from typing import Any, final

from bilevel.estimators.base import Estimator
from bilevel.estimators.recursion import (
    BackwardRecursion,
    WindowEnd,
    pull_mixed,
)
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import needs_gradient, partition


@final
class FirstOrder(Estimator):
    """`Adjoint` with the inner Hessian replaced by 0: with ḡ from the optimizer's VJP,

        λ ← λ',   μ ← μ',   φ̄ ← φ̄ + (∂b_t/∂φ)ᵀ ∂_b⟨∇_θ ℓ(θ_t, b_t), ḡ⟩ + (∂h_t/∂φ)ᵀ h̄

    For a learned initialisation under SGD that is first-order MAML, dF/dφ ≈ (∂θ_0/∂φ)ᵀ ∂F/∂θ_T: no
    second derivative is taken, and one first-order gradient a step was recorded with the run. Where
    φ is in the batch, its mixed product is taken exactly, by one double backward a step, the price
    of `Adjoint`'s.

    Exact for: an inner loss that is linear in θ; a window of one step that does not start at step
    0, with which under SGD it is the T1–T2 of Luketina et al. Optimizers, batches and outer losses
    are differentiated as they are. Else, for SGD of rate α on a loss of curvature ‖H‖ ≤ L, each λ
    is off by at most (1 + αL)^k − 1 of ‖∂F/∂θ‖ after k steps: by O(α), and by all of it where the
    run converges. Not for: φ in the inner loss and wide windows, where what early steps do is never
    forgotten and the sum grows with the window (use `Last(1)`, or `Adjoint`).

    Source: Finn, Abbeel and Levine, arXiv 1703.03400, section 5.2; Luketina et al.,
    arXiv 1511.06727.
    """

    uses_inner_gradients = True
    leaves_out = "the inner Hessian is taken as zero"

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        inner, end = trajectory.inner, WindowEnd.of(trajectory, outer_batch)
        recursion = BackwardRecursion(trajectory, end)
        for step, iterate, inputs in recursion.steps():
            cotangent, state_cotangents, direction, hyper_cotangents = recursion.pull_update(
                iterate, inputs
            )
            batch_leaves = partition(inputs.batch, needs_gradient)[0]
            mixed = []
            if batch_leaves:
                mixed = inner.run(pull_mixed, inner, iterate.params, inputs.batch, direction)
            end.gradient.pull(partition(inputs, needs_gradient)[0], [*mixed, *hyper_cotangents])
            recursion.step_back(step, cotangent, state_cotangents)
        return recursion.result(hessian_vector_products=0)
