"""A hypergradient from values of the outer loss alone."""

from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.estimators.base import Estimator, make_result
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables, outer_loss_value
from bilevel.random import Key
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate, Trajectory
from bilevel.tree import detach


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

    def __init__(self, sigma: float, pairs: int = 1) -> None:
        self.sigma = check_number("sigma", sigma, above=0)
        self.pairs = check_integer("pairs", pairs)

    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        window, key = trajectory.window, trajectory.key
        variables = OuterVariables(outer)
        centre = [leaf.detach() for leaf in variables.leaves]
        stop = inner.iterate_at(trajectory, outer, window.stop)
        loss, metrics = outer_loss_value(inner, stop.params, detach(outer), outer_batch)
        start = None if window.start == 0 else inner.iterate_at(trajectory, outer, window.start)

        def judge(leaves: list[Tensor]) -> Tensor:
            tree = variables.like(leaves)
            end, _ = advance(inner, start, tree, key, window.start, window.stop)
            return outer_loss_value(inner, end.params, tree, outer_batch)[0]

        samples: list[list[Tensor]] = []
        for pair in range(self.pairs):
            noise = draw_like(centre, key.fold("evolution_strategies", pair))
            above, below = (
                judge([leaf + sign * e for leaf, e in zip(centre, noise, strict=True)])
                for sign in (self.sigma, -self.sigma)
            )
            samples.append([e * ((above - below) / (2 * self.sigma)) for e in noise])
        error = set_to_mean(variables, samples)
        return make_result(
            inner,
            trajectory,
            variables,
            loss=loss,
            metrics=metrics,
            stop_params=stop.params,
            hessian_vector_products=0,
            standard_error=error,
        )


@torch.no_grad()
def advance(
    inner: InnerLoop, iterate: Iterate | None, outer: Any, key: Key, start: int, stop: int
) -> tuple[Iterate, Tensor]:
    """(the iterate at `stop`, the inner losses on the way) of the run from `iterate` at `start`.

    Without an iterate it starts at (θ_0, s_0).
    """
    hyperparameters = inner.hyperparameters(outer)
    if iterate is None:
        iterate = inner.start(outer, key, hyperparameters)
    losses = []
    for step in range(start, stop):
        batch = inner.batch(outer, step, key)
        gradient, loss = inner.gradient_without_graph(iterate.params, batch)
        iterate = inner.update(iterate, gradient, hyperparameters)
        losses.append(loss)
    return iterate, torch.stack(losses)


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


def set_to_mean(variables: OuterVariables, samples: list[list[Tensor]]) -> Tensor | None:
    """Make the mean of the samples the gradient.

    Returns:
        √(Σ variance / N) over all outer scalars; None for a single sample.
    """
    variances = []
    for leaf, *values in zip(variables.leaves, *samples, strict=True):
        stacked = torch.stack(values)
        leaf.grad = stacked.mean(0)
        if len(samples) > 1:
            variances.append(stacked.var(0).sum() / len(samples))
    return torch.stack(variances).sum().sqrt() if variances else None
