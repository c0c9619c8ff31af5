"""The exact hypergradient by plain autograd through the window."""

from typing import Any, final

import torch

from bilevel.estimators.base import Estimator, make_result
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate, Trajectory


@final
class Reverse(Estimator):
    """Exact: unroll the window with a graph and let autograd differentiate it.

    The reference that the others are judged by. Its memory grows by the graph of one inner step
    for every step of the window; `Adjoint` gives the same numbers in flat memory. Use it to check,
    or for tiny inner problems.
    """

    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        window, key = trajectory.window, trajectory.key
        variables = OuterVariables(outer)
        with torch.enable_grad():
            hyperparameters = inner.hyperparameters(variables.tree)
            iterate: Iterate
            if window.start == 0:
                iterate = inner.start(variables.tree, key, hyperparameters)
            else:
                iterate = inner.iterate_at(trajectory, outer, window.start)
            for step in range(window.start, window.stop):
                batch = inner.batch(variables.tree, step, key)
                iterate = inner.step(iterate, batch, hyperparameters)
        loss, metrics, cotangent = variables.outer_loss_at(inner, iterate.params, outer_batch)
        variables.accumulate([iterate.params], [cotangent])
        return make_result(
            inner,
            trajectory,
            variables,
            loss=loss,
            metrics=metrics,
            stop_params=iterate.params,
            hessian_vector_products=window.width,
        )
