"""The interface of a hypergradient estimator."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult, Stats
from bilevel.trajectory import Trajectory


class Estimator(ABC):
    """Turns a recorded run and its window into dF/dφ.

    Attributes:
        uses_inner_gradients: Whether the run should keep g_t beside every iterate it keeps.
        uses_second_derivatives: Whether the inner loss must be differentiable twice.
        carries_over: What a call takes over from the one before, in words; empty where calls have
            nothing to do with each other. Whoever trains another inner problem in every outer step
            has no use for an estimator that carries anything over.
    """

    uses_inner_gradients: bool = False
    uses_second_derivatives: bool = True
    carries_over: str = ""

    @abstractmethod
    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        """The hypergradient over `trajectory.window`.

        The iterate at the start of the window is a constant, unless the window starts at step 0:
        then it is `Problem.init(outer)` and its derivative is part of the result.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state to save, of plain numbers, strings and tensors. Empty without state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ConfigurationError: It was saved by another kind of estimator.
        """
        if state:
            raise ConfigurationError(
                f"{type(self).__name__} has no state, but was given one with {sorted(state)}"
            )


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
    remarks: Sequence[str] = (),
    **stats: Any,
) -> HypergradientResult:
    """Assemble a result from what accumulated on `variables`, all of it without a graph.

    `remarks` are sentences that join the status; `stats` are further fields of `Stats`.
    """
    grads, status = variables.gradients(inner, trajectory)
    remarks = [*([] if status == "ok" else [status]), *remarks]
    return HypergradientResult(
        loss=loss.detach(),
        grads=variables.like(grads),
        window=trajectory.window,
        stats=Stats(
            status="; ".join(remarks) or "ok",
            hypergradient_norm=torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
            ),
            hessian_vector_products=hessian_vector_products,
            cotangent_norms=cotangent_norms,
            **stats,
        ),
        params=inner.unravel(stop_params.detach()),
        trace=trajectory.trace,
        metrics=metrics,
    )
