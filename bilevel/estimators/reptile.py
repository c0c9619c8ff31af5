"""Reptile: a learned initialisation moves towards where the run ends."""

from typing import Any, final

import torch

from bilevel.errors import ConfigurationError, ProblemError
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.recording.outer_gradient import OuterGradient, outer_loss_value
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import detach


@final
class Reptile(Estimator):
    """In place of dF/dφ, for a learned initialisation θ_0 = init(φ), the direction

        (∂θ_0/∂φ)ᵀ (θ_0 − θ_T),      which is φ − θ_T for θ_0 = φ:

    the gradient of ½‖θ_0 − θ_T‖² with θ_T held. A step of outer SGD at rate ε then is Reptile's
    φ ← φ + ε(θ_T − φ). Nothing is differentiated but the inner loss, once, to train: the price is
    that of the run, the memory that of two iterates. The outer loss is reported, and has no part
    in the direction.

    Exact for: nothing; it is no estimate of dF/dφ, and of another size, under SGD of rate α that of
    α Σ_t ∇ℓ(θ_t). For tasks drawn at random its mean points, for small αT, towards a low inner
    loss and towards inner gradients of a task's batches that agree, as MAML's does. Where every
    run converges, it comes to rest at the mean of the optima.

    Raises:
        ConfigurationError: (in a call) The window is not the whole run.
        ProblemError: (in a call) An outer variable does not reach the initialisation, or reaches
            a batch or a hyperparameter as well.

    Source: Nichol, Achiam and Schulman, arXiv 1803.02999.
    """

    uses_second_derivatives = False
    uses_step_losses = False
    differentiates_optimizer = False
    leaves_out = "it moves the initialisation towards the end of the run, whatever the outer loss"

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        window, first = trajectory.window, trajectory.first
        if (window.start, window.stop) != (0, trajectory.steps):
            raise ConfigurationError(
                f"window [{window.start}, {window.stop}) of {trajectory.steps} steps: Reptile "
                "takes the whole run, so truncation must be Full()"
            )
        _check_is_a_start(trajectory)
        last = trajectory.iterate_at(window.stop)
        gradient = OuterGradient(trajectory, twice=False)
        gradient.pull([first.params], [first.params.detach() - last.params])
        outer = detach(trajectory.variables.tree)
        loss, metrics = outer_loss_value(trajectory.inner, last.params, outer, outer_batch)
        end = WindowEnd(gradient, last, loss, metrics, torch.zeros_like(last.params))
        return make_result(trajectory, end, hessian_vector_products=0)


def _check_is_a_start(trajectory: Trajectory) -> None:
    """Raise `ProblemError` unless φ is an initialisation and nothing else."""
    variables = trajectory.variables

    def reached(tree: Any) -> set[str]:
        slopes = variables.slopes(tree)  # none where nothing in the tree is on a graph
        named = zip(variables.names, slopes, strict=False)
        return {name for name, slope in named if slope is not None}

    others = [name for name in variables.names if name not in reached(trajectory.first.params)]
    if others:
        raise ProblemError(
            f"outer variables {others} do not reach the initialisation, and Reptile moves nothing "
            "else: use FirstOrder() or Adjoint()"
        )
    for part, tree in zip(("batch", "hyperparameters"), trajectory.inputs_at(0), strict=True):
        if found := sorted(reached(tree)):
            raise ProblemError(
                f"outer variables {found} reach the {part} of inner step 0 as well as the "
                "initialisation, and Reptile would leave that out: use FirstOrder() or Adjoint()"
            )
