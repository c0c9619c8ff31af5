"""The interface of a hypergradient estimator."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult, Stats
from bilevel.trajectory import Trajectory


class Estimator(ABC):
    """Turns a recorded run and its window into dF/dφ."""

    @abstractmethod
    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        """The hypergradient over `trajectory.window`.

        The iterate at the start of the window is a constant, unless the window starts at step 0:
        then it is `Problem.init(outer)` and its derivative is part of the result.
        """


def make_result(
    inner: InnerLoop,
    trajectory: Trajectory,
    variables: OuterVariables,
    *,
    loss: Tensor,
    metrics: dict[str, Tensor],
    stop_params: Tensor,
    hessian_vector_products: int,
    cotangent_norms: Tensor | None = None,
) -> HypergradientResult:
    """Assemble a result from what accumulated on `variables`, all of it without a graph."""
    grads, status = variables.gradients(inner, trajectory)
    return HypergradientResult(
        loss=loss.detach(),
        grads=variables.like(grads),
        window=trajectory.window,
        stats=Stats(
            status=status,
            hypergradient_norm=torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
            ),
            hessian_vector_products=hessian_vector_products,
            cotangent_norms=cotangent_norms,
        ),
        params=inner.unravel(stop_params.detach()),
        trace=trajectory.trace,
        metrics=metrics,
    )
