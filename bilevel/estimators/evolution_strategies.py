"""A hypergradient from values of the outer loss alone."""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.random import Key
from bilevel.recording.outer_gradient import OuterGradient, outer_loss_value
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import detach
from bilevel.variables import Iterate
from bilevel.window import Window


@final
class EvolutionStrategies(Estimator):
    """The gradient of the outer loss smoothed by a Gaussian, from runs at perturbed φ:

        dF/dφ ≈ 1/N Σᵢ εᵢ [F(φ + σεᵢ) − F(φ − σεᵢ)] / 2σ,      εᵢ ~ N(0, I)

    where F(φ) runs the window again from its start with the same inner randomness; the start is a
    constant unless it is step 0. Neither the outer loss nor anything else is differentiated but
    the inner loss, once, to train: right for outer losses without a useful derivative (accuracies)
    and for windows so long that exact gradients explode.

    Unbiased for the gradient of E F(φ + σε), which is ∇F + O(σ²), and ∇F itself where F is
    quadratic in φ. The variance is about m/N of ‖∇F‖² for m outer scalars, so for a hundred of them
    it takes a hundred pairs to see the direction: for few outer variables only. An outer variable
    that nothing depends on gets noise, not an error.

    Args:
        sigma: σ > 0, in units of the outer variables.
        pairs: N ≥ 1; each costs two runs of the window.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Salimans et al., arXiv 1703.03864, with mirrored sampling; for inner runs, Metz et al.,
    arXiv 1810.10180.
    """

    uses_second_derivatives = False
    runs_again = True
    repeats_outer_loss = True
    differentiates_optimizer = False
    leaves_out = "the gradient is that of a smoothed outer loss, and sampled"

    def __init__(self, sigma: float, pairs: int = 1) -> None:
        self.sigma = check_number("sigma", sigma, above=0)
        self.pairs = check_integer("pairs", pairs)

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        window, variables = trajectory.window, trajectory.variables
        centre = [leaf.detach() for leaf in variables.leaves]
        start = None if window.start == 0 else trajectory.iterate_at(window.start)

        def objective(leaves: list[Tensor]) -> Tensor:
            segment = advance(trajectory, start, variables.like(leaves), window)
            return (
                segment.loss
                + outer_loss_value(
                    trajectory.inner, segment.iterate.params, segment.outer, outer_batch
                )[0]
            )

        samples: list[list[Tensor]] = []
        for pair in range(self.pairs):
            noise = draw_like(centre, trajectory.key.fold("evolution_strategies", pair))
            above, below = (
                objective([leaf + sign * e for leaf, e in zip(centre, noise, strict=True)])
                for sign in (self.sigma, -self.sigma)
            )
            samples.append([e * ((above - below) / (2 * self.sigma)) for e in noise])
        end = end_of(trajectory, _recorded(trajectory, start), outer_batch)
        error = set_to_mean(end.gradient, samples)
        return make_result(trajectory, end, hessian_vector_products=0, standard_error=error)


class Segment(NamedTuple):
    """Some steps of a run, without derivatives.

    Attributes:
        iterate: (θ, s) after them.
        outer: The outer variables of this run.
        loss: Σ_t f_t over them, 0 where the problem has no losses along the run.
        inner_losses: ℓ of every step.
    """

    iterate: Iterate
    outer: Any
    loss: Tensor
    inner_losses: Tensor


@torch.no_grad()
def advance(trajectory: Trajectory, iterate: Iterate | None, outer: Any, window: Window) -> Segment:
    """The steps of `window` from `iterate` with other outer variables and the same randomness.

    Without an iterate they start at (θ_0, s_0).
    """
    inner, key = trajectory.inner, trajectory.key
    if iterate is None:
        iterate = inner.start(outer, key, inner.hyperparameters(outer, 0))
    inner_losses, total = [], iterate.params.new_zeros(())
    for step in range(window.start, window.stop):
        inputs = inner.inputs(outer, step, key)
        gradient, loss = inner.gradient_without_graph(iterate.params, inputs.batch)
        iterate = inner.update(iterate, gradient, inputs.hyperparameters)
        inner_losses.append(loss)
        if inner.has_step_loss:
            total = total + inner.step_loss(iterate.params, outer, step, key)
    return Segment(iterate, outer, total, torch.stack(inner_losses))


def _recorded(trajectory: Trajectory, start: Iterate | None) -> Segment:
    """The window as it was recorded; losses along it are not, so for these it is run again."""
    outer, window = detach(trajectory.variables.tree), trajectory.window
    if trajectory.inner.has_step_loss:
        return advance(trajectory, start, outer, window)
    end = trajectory.iterate_at(window.stop)
    return Segment(end, outer, end.params.new_zeros(()), trajectory.trace["inner_loss"])


def end_of(trajectory: Trajectory, segment: Segment, outer_batch: Any) -> WindowEnd:
    """The end of a segment, without derivatives: a zero gradient is then no proof of anything."""
    loss, metrics = outer_loss_value(
        trajectory.inner, segment.iterate.params, segment.outer, outer_batch
    )
    return WindowEnd(
        OuterGradient(trajectory, twice=False, certain=False),
        segment.iterate,
        loss + segment.loss,
        metrics,
        torch.zeros_like(segment.iterate.params),
    )


def draw_like(leaves: list[Tensor], key: Key) -> list[Tensor]:
    """Standard normal tensors of the same shapes, dtypes and devices."""
    return [
        torch.randn(
            leaf.shape,
            dtype=leaf.dtype,
            device=leaf.device,
            generator=key.generator(index, device=leaf.device),
        )
        for index, leaf in enumerate(leaves)
    ]


def set_to_mean(gradient: OuterGradient, samples: list[list[Tensor]]) -> Tensor | None:
    """Make the mean of the samples the gradient.

    Returns:
        √(Σ variance / N) over all outer scalars; None for a single sample.
    """
    by_leaf = [torch.stack(values) for values in zip(*samples, strict=True)]
    gradient.add([values.mean(0) for values in by_leaf])
    if len(samples) == 1:
        return None
    variances = [values.var(0).sum() / len(samples) for values in by_leaf]
    return torch.stack(variances).sum().sqrt()
