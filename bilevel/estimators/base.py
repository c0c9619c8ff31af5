"""The interface of a hypergradient estimator, and what every one of them returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.outer_gradient import OuterGradient
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult, Stats
from bilevel.variables import Iterate, OuterVariables, StepInputs


class Estimator(ABC):
    """Turns a recorded run and its window into dF/dφ.

    Attributes:
        uses_inner_gradients: Whether the run should keep g_t beside every iterate it keeps.
        uses_second_derivatives: Whether the inner loss must be differentiable twice.
        uses_graph: Whether it differentiates a window that was recorded with its graph.
        runs_again: Whether it runs steps again for other φ, so that a batch which is not the same
            when it is made again would mislead it.
        repeats_outer_loss: Whether it evaluates the outer loss more than once, so that one which is
            another function every time would mislead it.
        uses_step_losses: Whether it can differentiate losses along the run.
        differentiates_optimizer: Whether it differentiates the optimizer's step.
        carries_over: What a call takes over from the one before, in words; empty where calls have
            nothing to do with each other. Whoever trains another inner problem in every outer step
            has no use for an estimator that carries anything over.
        carries_over_by_replica: Whether each of `inner_replicas` takes over its own.
        leaves_out: What a result leaves out by design, in words; empty where it is exact.
    """

    uses_inner_gradients: bool = False
    uses_second_derivatives: bool = True
    uses_graph: bool = False
    runs_again: bool = False
    repeats_outer_loss: bool = False
    uses_step_losses: bool = True
    differentiates_optimizer: bool = True
    carries_over: str = ""
    carries_over_by_replica: bool = False
    leaves_out: str = ""

    @abstractmethod
    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        """The hypergradient over `trajectory.window`.

        The iterate at the start of the window is a constant, unless the window starts at step 0:
        then it is `Problem.init(outer)` and its derivative is part of the result.
        """

    def check_step(
        self,
        inner: InnerLoop,
        variables: OuterVariables,
        key: Key,
        iterate: Iterate,
        inputs: StepInputs,
    ) -> None:
        """Look at inner step 0, once: is it one that this estimator can differentiate?

        Args:
            inner: The inner loop.
            variables: φ.
            key: The randomness of the run.
            iterate: (θ_0, s_0), without a graph.
            inputs: What the step takes of φ, on its graph.

        Raises:
            ProblemError: It is not.
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


@dataclass(frozen=True)
class WindowEnd:
    """Where a window ends, and what the outer loss is there.

    Attributes:
        gradient: dF/dφ so far: ∂F/∂φ.
        iterate: (θ_stop, s_stop).
        loss: F.
        metrics: What `Problem.outer_loss` reported beside it.
        cotangent: λ = ∂F/∂θ_stop, of shape [p].
    """

    gradient: OuterGradient
    iterate: Iterate
    loss: Tensor
    metrics: dict[str, Tensor]
    cotangent: Tensor

    @classmethod
    def of(cls, trajectory: Trajectory, outer_batch: Any, *, twice: bool = True) -> WindowEnd:
        """The end of `trajectory.window`; `twice` as of `OuterGradient`."""
        gradient = OuterGradient(trajectory, twice=twice)
        stop = trajectory.iterate_at(trajectory.window.stop)
        return cls(gradient, stop, *gradient.outer_loss_at(stop.params, outer_batch))


def make_result(
    trajectory: Trajectory,
    end: WindowEnd,
    *,
    hessian_vector_products: int,
    loss: Tensor | None = None,
    remarks: Sequence[str] = (),
    **stats: Any,
) -> HypergradientResult:
    """What has gathered on `end.gradient` as a result, all of it without a graph.

    Args:
        trajectory: The recorded run and its window.
        end: The end of the window.
        hessian_vector_products: As in `Stats`.
        loss: The outer loss with those along the run; default: that at the end of the window.
        remarks: Sentences that join the status.
        **stats: Further fields of `Stats`.
    """
    grads, status = end.gradient.total()
    remarks = [*([] if status == "ok" else [status]), *remarks]
    return HypergradientResult(
        loss=(end.loss if loss is None else loss).detach(),
        grads=trajectory.variables.like(grads),
        window=trajectory.window,
        stats=Stats(
            status="; ".join(remarks) or "ok",
            hypergradient_norm=torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
            ),
            hessian_vector_products=hessian_vector_products,
            **stats,
        ),
        params=trajectory.inner.unravel(end.iterate.params.detach()),
        trace=trajectory.trace,
        metrics=end.metrics,
    )
