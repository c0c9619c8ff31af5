"""What every backward recursion through a window shares: its ends, its sums, and the optimizer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.estimators.base import make_result
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate, Trajectory
from bilevel.tree import detach, needs_gradient, partition


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


@final
class BackwardRecursion:
    """λ, μ and h̄ on their way from the end of a window to its start.

    An estimator says what one step does to them, in `step_back`; what comes before the first step
    and after the last one is here.

    Args:
        inner: The inner loop.
        trajectory: The recorded run and its window.
        outer: φ.
        end: The end of the window; its outer variables are used up.

    Attributes:
        cotangent: λ, of shape [p].
        state_cotangents: μ, leaf by leaf: 0 at first, since the outer loss does not see the
            optimizer's state.
        hyperparameters: h(φ), without a graph.
    """

    def __init__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, end: WindowEnd
    ) -> None:
        self._inner, self._trajectory, self._outer, self._end = inner, trajectory, outer, end
        self.cotangent = end.cotangent
        self.state_cotangents = [torch.zeros_like(leaf) for leaf in partition(end.iterate.state)[0]]
        with torch.enable_grad():
            self._hyperparameters = inner.hyperparameters(end.variables.tree)
        self.hyperparameters = detach(self._hyperparameters)
        self._hyper_cotangents = {
            name: torch.zeros_like(value) for name, value in self.hyperparameters.items()
        }
        self._norms = [torch.linalg.vector_norm(self.cotangent)]

    def steps(self) -> Iterator[tuple[int, Iterate]]:
        """(t, (θ_t, s_t)) for t = stop−1 down to start."""
        return self._inner.iterates_backward(self._trajectory, self._outer)

    def batch(self, step: int) -> tuple[Any, list[Tensor]]:
        """b_t, and its tensors that are on the graph of φ."""
        with torch.enable_grad():
            batch = self._inner.batch(self._end.variables.tree, step, self._trajectory.key)
        return batch, partition(batch, needs_gradient)[0]

    def accumulate(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        """φ̄ += (∂inputs/∂φ)ᵀ cotangents, for tensors of a batch."""
        self._end.variables.accumulate(inputs, cotangents)

    def step_back(
        self,
        cotangent: Tensor,
        state_cotangents: list[Tensor],
        hyper_cotangents: Mapping[str, Tensor],
    ) -> None:
        """Put λ and μ one step earlier, and add that step's h̄."""
        self.cotangent, self.state_cotangents = cotangent, state_cotangents
        for name, value in hyper_cotangents.items():
            self._hyper_cotangents[name] = self._hyper_cotangents[name] + value
        self._norms.append(torch.linalg.vector_norm(cotangent))

    def result(
        self, *, hessian_vector_products: int, remarks: Sequence[str] = (), **stats: Any
    ) -> HypergradientResult:
        """What has accumulated, with (∂(θ_0, s_0)/∂φ)ᵀ (λ, μ) if the window starts at step 0.

        The arguments are those of `make_result`.
        """
        inner, trajectory, end = self._inner, self._trajectory, self._end
        variables = end.variables
        variables.accumulate(
            list(self._hyperparameters.values()), list(self._hyper_cotangents.values())
        )
        if trajectory.window.start == 0:
            with torch.enable_grad():
                start = inner.start(
                    variables.tree, trajectory.key, inner.hyperparameters(variables.tree)
                )
            variables.accumulate(
                [start.params, *partition(start.state)[0]],
                [self.cotangent, *self.state_cotangents],
            )
        return make_result(
            inner,
            trajectory,
            variables,
            loss=end.loss,
            metrics=end.metrics,
            stop_params=end.iterate.params,
            hessian_vector_products=hessian_vector_products,
            cotangent_norms=torch.stack(self._norms[::-1]),
            remarks=remarks,
            **stats,
        )


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
