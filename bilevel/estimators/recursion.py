"""What every backward recursion through a window shares: its ends, its sums, and the optimizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.estimators.base import WindowEnd, make_result
from bilevel.recording.block import Block, run_backward
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import needs_gradient, partition
from bilevel.variables import Iterate, StepInputs


@final
class BackwardRecursion:
    """λ and μ on their way from the end of a window to its start.

    An estimator says what one step does to them, in `step_back`; what comes before the first step
    and after the last one is here, and so are losses along the run.

    Args:
        trajectory: The recorded run and its window.
        end: The end of the window.

    Attributes:
        cotangent: λ, of shape [p].
        state_cotangents: μ, leaf by leaf: 0 at first, since the outer loss does not see the
            optimizer's state.
    """

    def __init__(self, trajectory: Trajectory, end: WindowEnd) -> None:
        self._trajectory, self._end = trajectory, end
        self.cotangent = end.cotangent
        self.state_cotangents = [torch.zeros_like(leaf) for leaf in partition(end.iterate.state)[0]]
        self._norms: list[Tensor] = []
        self._losses = [end.loss]
        self._repeated: dict[int, Tensor] = {}

    def steps(self) -> Iterator[tuple[int, Iterate, StepInputs]]:
        """(t, (θ_t, s_t), what the step takes of φ, on its graph) for t = stop−1 down to start."""
        after = self._end.iterate
        for step, iterate in self._trajectory.iterates_backward():
            if self._trajectory.inner.has_step_loss:
                loss, slope = self._end.gradient.step_loss_at(after.params, step)
                self.cotangent = self.cotangent + slope
                self._losses.append(loss)
            self._norms.append(torch.linalg.vector_norm(self.cotangent))
            yield step, iterate, self._trajectory.inputs_at(step)
            after = iterate

    def pull_update(
        self, iterate: Iterate, inputs: StepInputs
    ) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """(λ', μ', ḡ, h̄) of the optimizer's step at (θ_t, s_t): `pull_update` of λ and μ."""
        inner = self._trajectory.inner
        pulled: tuple[Tensor, list[Tensor], Tensor, list[Tensor]] = inner.run(
            pull_update,
            inner,
            iterate.params,
            iterate.state,
            _inner_gradient(inner, iterate, inputs),
            inputs.hyperparameters,
            self.cotangent,
            self.state_cotangents,
        )
        return pulled

    def step_back(
        self,
        step: int,
        cotangent: Tensor,
        state_cotangents: list[Tensor],
        *,
        loss: Tensor | None = None,
    ) -> None:
        """Put λ and μ before inner step `step`; `loss` is its inner loss, evaluated again."""
        self.cotangent, self.state_cotangents = cotangent, state_cotangents
        if loss is not None:
            self._repeated[step] = loss

    def step_through(self, block: Block, step_back: Callable[..., Any]) -> None:
        """Take λ and μ back through the steps of a block at once, as `run_backward` does."""
        cotangent, state_cotangents, losses, norms, of_learned = run_backward(
            self._trajectory.inner, block, step_back, self.cotangent, self.state_cotangents
        )
        self._end.gradient.pull(block.learned(), of_learned)
        self.cotangent, self.state_cotangents = cotangent, state_cotangents
        self._norms.extend(norms.flip(0).unbind())
        self._repeated.update(zip(range(block.start, block.stop), losses.unbind(), strict=True))

    def result(
        self, *, hessian_vector_products: int, remarks: Sequence[str] = (), **stats: Any
    ) -> HypergradientResult:
        """What has gathered, with (∂(θ_0, s_0)/∂φ)ᵀ (λ, μ) if the window starts at step 0.

        The arguments are those of `make_result`.
        """
        trajectory, end = self._trajectory, self._end
        trajectory.check_repeated(self._repeated)
        if trajectory.window.start == 0:
            first = trajectory.first
            end.gradient.pull(
                [first.params, *partition(first.state)[0]], [self.cotangent, *self.state_cotangents]
            )
        return make_result(
            trajectory,
            end,
            loss=torch.stack([loss.to(end.loss) for loss in self._losses]).sum(),
            hessian_vector_products=hessian_vector_products,
            cotangent_norms=torch.stack(
                [torch.linalg.vector_norm(self.cotangent), *self._norms[::-1]]
            ),
            remarks=remarks,
            method="recursion" + (f": {trajectory.no_graph}" if trajectory.no_graph else ""),
            **stats,
        )


def pull_update(
    inner: InnerLoop,
    params: Tensor,
    state: Any,
    gradient: Tensor,
    hyperparameters: Any,
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """(λ', μ', ḡ, h̄): the VJP of the optimizer step Φ at (θ_t, s_t, g_t, h), applied to (λ, μ).

    h̄ is by leaf of the hyperparameters that require a gradient.
    """
    state_leaves, rebuild_state = partition(state)
    hyper_leaves, rebuild_hyper = partition(hyperparameters, needs_gradient)
    at = [
        leaf.detach().requires_grad_() for leaf in (params, *state_leaves, gradient, *hyper_leaves)
    ]
    count = 1 + len(state_leaves)
    with torch.enable_grad():
        after = inner.update(
            Iterate(at[0], rebuild_state(at[1:count])), at[count], rebuild_hyper(at[count + 1 :])
        )
    pulled = pull(after, at, cotangent, state_cotangents)
    return pulled[0], pulled[1:count], pulled[count], pulled[count + 1 :]


def pull(
    after: Iterate, at: Sequence[Tensor], cotangent: Tensor, state_cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """(λ, μ) at (θ_{t+1}, s_{t+1}) pulled back to the tensors `at`, on which those depend."""
    outputs, cotangents = [], []
    leaves = [after.params, *partition(after.state)[0]]
    for output, given in zip(leaves, (cotangent, *state_cotangents), strict=True):
        if output.requires_grad:
            outputs.append(output)
            cotangents.append(given)
    if not outputs:
        return [torch.zeros_like(leaf) for leaf in at]
    return list(torch.autograd.grad(outputs, at, cotangents, materialize_grads=True))


def pull_mixed(inner: InnerLoop, params: Tensor, batch: Any, cotangent: Tensor) -> Sequence[Tensor]:
    """∂_b⟨∇_θ ℓ(θ, b), ḡ⟩ by leaf of b that requires a gradient.

    By autograd over autograd: in eager mode that beats `torch.func.vjp(torch.func.grad(…))`, which
    cannot use the fused first-order kernels, nor add gradients up in place.
    """
    given, rebuild = partition(batch, needs_gradient)
    leaves = [leaf.detach().requires_grad_() for leaf in given]
    with torch.enable_grad():
        gradient, _ = inner.gradient_with_graph(params.detach().requires_grad_(), rebuild(leaves))
    if not (leaves and gradient.requires_grad):
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(gradient, leaves, cotangent, materialize_grads=True)


def _inner_gradient(inner: InnerLoop, iterate: Iterate, inputs: StepInputs) -> Tensor:
    """g_t, taken again where it was not kept."""
    if iterate.gradient is not None:
        return iterate.gradient
    return inner.gradient_without_graph(iterate.params, inputs.batch)[0]


def gradient_response(
    inner: InnerLoop, iterate: Iterate, gradient: Tensor, hyperparameters: Any, *, steps: int
) -> Tensor:
    """By how much a unit of gradient at `iterate` moves each parameter within `steps`, above 0.

    |∂θ_{t+1}/∂g_t| times Σ_{i<steps} qⁱ, where q is by how much of it one more step adds. That is
    exact for momentum, and the diagonal that it is for any optimizer that treats parameters one by
    one. For others it is a positive scale like any other: what `Krylov` makes of it is a basis.
    """
    ones = torch.ones_like(gradient)
    hyperparameters = optree.tree_map(torch.Tensor.detach, hyperparameters)
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
