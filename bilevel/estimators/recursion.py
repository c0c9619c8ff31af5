"""What every backward recursion through a window shares: its two ends, and the optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.trajectory import Iterate, Trajectory
from bilevel.tree import partition


@dataclass(frozen=True)
class WindowEnd:
    """Where a backward recursion starts.

    Attributes:
        variables: The outer variables, with ∂F/∂φ accumulated.
        iterate: (θ_stop, s_stop).
        loss: F.
        metrics: What `Problem.outer_loss` reported beside it.
        cotangent: λ = ∂F/∂θ_stop, of shape [p].
    """

    variables: OuterVariables
    iterate: Iterate
    loss: Tensor
    metrics: dict[str, Tensor]
    cotangent: Tensor

    @classmethod
    def of(
        cls, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> "WindowEnd":
        """The end of `trajectory.window`."""
        variables = OuterVariables(outer)
        stop = inner.iterate_at(trajectory, outer, trajectory.window.stop)
        loss, metrics, cotangent = variables.outer_loss_at(inner, stop.params, outer_batch)
        return cls(variables, stop, loss, metrics, cotangent)

    def state_cotangents(self) -> list[Tensor]:
        """μ = 0, leaf by leaf: the outer loss does not see the optimizer's state."""
        return [torch.zeros_like(leaf) for leaf in partition(self.iterate.state)[0]]


def pull_update(
    inner: InnerLoop,
    params: Tensor,
    state: Any,
    gradient: Tensor,
    hyperparameters: Mapping[str, Tensor],
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
    """(λ', μ', ḡ, h̄): the VJP of the optimizer step Φ at (θ_t, s_t, g_t, h), applied to (λ, μ)."""
    state_leaves, rebuild_state = partition(state)

    def update(
        params: Tensor,
        state_leaves: list[Tensor],
        gradient: Tensor,
        hyperparameters: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        after = inner.update(
            Iterate(params, rebuild_state(state_leaves)), gradient, hyperparameters
        )
        return after.params, partition(after.state)[0]

    _, pull, *_ = torch.func.vjp(update, params, state_leaves, gradient, dict(hyperparameters))
    return pull((cotangent, state_cotangents))


def accumulate_start(
    variables: OuterVariables,
    inner: InnerLoop,
    trajectory: Trajectory,
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> None:
    """φ̄ += (∂(θ_0, s_0)/∂φ)ᵀ (λ, μ) where the window starts at step 0."""
    if trajectory.window.start > 0:
        return
    with torch.enable_grad():
        start = inner.start(variables.tree, trajectory.key, inner.hyperparameters(variables.tree))
    variables.accumulate([start.params, *partition(start.state)[0]], [cotangent, *state_cotangents])


def gradient_response(
    inner: InnerLoop,
    iterate: Iterate,
    gradient: Tensor,
    hyperparameters: Mapping[str, Tensor],
    *,
    steps: int,
) -> Tensor:
    """By how much a unit of gradient at `iterate` moves each parameter within `steps`, above 0.

    |∂θ_{t+1}/∂g_t| times Σ_{i<steps} qⁱ, where q is by how much of it one more step adds. That is
    exact for momentum, and the diagonal that it is for any optimizer that treats parameters one by
    one. For others it is a positive scale like any other: what `Krylov` makes of it is a basis.
    """
    ones = torch.ones_like(gradient)
    state = [torch.zeros_like(leaf) for leaf in partition(iterate.state)[0]]
    _, state, first, _ = inner.run(
        pull_update, inner, iterate.params, iterate.state, gradient, hyperparameters, ones, state
    )
    _, _, second, _ = inner.run(
        pull_update, inner, iterate.params, iterate.state, gradient, hyperparameters, ones, state
    )
    peak = first.abs().max()
    momentum = (first @ (second - first) / (first @ first)).nan_to_num(0.0).clamp(0, 0.999)
    gain = (1 - momentum**steps) / (1 - momentum)
    response = gain * first.abs().clamp_min(torch.finfo(first.dtype).eps * peak)
    return torch.where(response > 0, response, ones)
