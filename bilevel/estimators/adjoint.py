"""The exact gradient of a window: by its graph where it was kept, else by a backward recursion."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from bilevel.checks import check_choice
from bilevel.contract.derivatives import check_forward_mode
from bilevel.contract.repeatable import Kept
from bilevel.errors import ProblemError
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.estimators.recursion import BackwardRecursion, pull, pull_update
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.outer_gradient import OUTER_LOSS_APART, OuterGradient
from bilevel.recording.short_run import ShortRun
from bilevel.recording.trajectory import Trajectory
from bilevel.recording.unrolled import Unrolled
from bilevel.result import HypergradientResult
from bilevel.tree import needs_gradient, partition
from bilevel.variables import Iterate, OuterVariables, StepInputs


@final
class Reverse(Estimator):
    """Exact: autograd through the graph of all steps of the window at once, whatever its size.

    The reference that the others are judged by. Its memory grows by the graph of one inner step
    for every step of the window. `Adjoint` does the same where that fits a budget, and gives the
    same numbers in flat memory where it does not.
    """

    uses_graph = True

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        unrolled = trajectory.unrolled
        if unrolled is None or not trajectory.has_graph:
            unrolled = _run_again(trajectory)
        return through_graph(trajectory, unrolled, outer_batch)


def through_graph(
    trajectory: Trajectory, unrolled: Unrolled, outer_batch: Any
) -> HypergradientResult:
    """dF/dφ by autograd through the graph of the window."""
    window, inner = trajectory.window, trajectory.inner
    variables = trajectory.variables
    leaves, count = variables.leaves, len(variables.leaves)
    end = WindowEnd.of(trajectory, outer_batch)
    outputs, cotangents = list(unrolled.points[-1]), unrolled.like(end.cotangent)
    losses = [end.loss]
    if inner.has_step_loss:
        for index, step in enumerate(range(window.start, window.stop), start=1):
            with torch.enable_grad():
                loss = inner.step_loss(
                    unrolled.flat(index), variables.own_tree, step, trajectory.key
                )
            losses.append(loss.detach().to(end.loss))
            if loss.requires_grad:
                outputs.append(loss)
                cotangents.append(torch.ones_like(loss))
    # Only what is asked for: were iterates among it, autograd could add nothing up in place.
    at = [*leaves, *variables.own_leaves] if inner.has_step_loss else leaves
    grads = torch.autograd.grad(outputs, at, cotangents, allow_unused=True)
    end.gradient.add(grads[:count])
    end.gradient.add_of_loss(grads[count:])
    return make_result(
        trajectory,
        end,
        loss=torch.stack(losses).sum(),
        hessian_vector_products=window.width,
        method="recorded graph",
    )


def _run_again(trajectory: Trajectory) -> Unrolled:
    """The window with its graph, run once more."""
    start = trajectory.window.start
    iterate = trajectory.first if start == 0 else trajectory.iterate_at(start)
    unrolled, losses = Unrolled(trajectory.inner, iterate, start), {}
    kept: dict[int, Kept] = {}
    for step in range(start, trajectory.window.stop):
        inputs = trajectory.inputs_at(step)
        if len(kept) < 2:
            kept[step] = Kept(trajectory.variables, inputs)
        losses[step] = unrolled.step(inputs)
    trajectory.check_repeated(losses)
    for step, inputs_then in kept.items():
        inputs_then.check(step)
    return unrolled


@final
class Adjoint(Estimator):
    """Exact, and the default: what autograd gives through the whole window.

    From λ = ∂F/∂θ_stop and μ = 0, for t = stop−1 … start:

        λ', μ', ḡ, h̄ = VJP of the optimizer step Φ at (θ_t, s_t, g_t, h_t), applied to (λ, μ)
        (H_t ḡ, b̄)   = ∇_{θ,b} ⟨∇_θ ℓ(θ_t, b_t), ḡ⟩
        λ ← λ' + H_t ḡ,   μ ← μ',   φ̄ ← φ̄ + (∂b_t/∂φ)ᵀ b̄ + (∂h_t/∂φ)ᵀ h̄

    with φ̄ starting at ∂F/∂φ, and (∂θ_0/∂φ)ᵀ λ added when start = 0. Of losses along the run,
    ∂f_t/∂θ is added to λ at θ_{t+1}, and ∂f_t/∂φ to φ̄. Memory: the kept iterates plus the graph of
    one step, whatever the width of the window.

    Where the schedule knows its window before the run and the graphs of all its steps fit the
    budget of `Hypergradient(graph_budget=…)`, the run is recorded with its graph, and autograd
    goes through that once: the same up to rounding, in the time of a loop written by hand.

    Args:
        hvp: How H_t ḡ and the mixed product are computed, together. "reverse": reverse mode over
            reverse mode, usually faster. "forward": forward mode over reverse mode, always by the
            recursion, with less memory for the step; the inner loss may then use only operations
            that have a forward derivative (not `mse_loss(reduction="mean")`, `cdist`).

    Exact for: any window, any number of outer variables. Not for: inner losses without a second
    derivative (use finite differences), or very long windows near a converged inner problem, where
    an implicit estimator costs less.

    Raises:
        ConfigurationError: `hvp` is neither.
    """

    def __init__(self, hvp: Literal["reverse", "forward"] = "reverse") -> None:
        self.hvp = check_choice("hvp", hvp, ("reverse", "forward"))
        self.uses_graph = hvp == "reverse"

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        if trajectory.unrolled is not None and trajectory.has_graph:
            return through_graph(trajectory, trajectory.unrolled, outer_batch)
        if trajectory.short_run is not None:
            return _of_short_run(trajectory, trajectory.short_run)
        return self.through_window(trajectory, WindowEnd.of(trajectory, outer_batch))

    def check_step(
        self,
        inner: InnerLoop,
        variables: OuterVariables,
        key: Key,
        iterate: Iterate,
        inputs: StepInputs,
    ) -> None:
        if self.hvp == "reverse":
            return
        leaves, rebuild = partition(inputs.batch, needs_gradient)
        leaves = [leaf.detach().contiguous() for leaf in leaves]

        def reverse(params: Tensor) -> Sequence[Tensor]:
            at = [params, *(leaf.requires_grad_() for leaf in leaves)]
            loss = inner.loss(params, rebuild(at[1:]))
            return torch.autograd.grad(loss, at, create_graph=True, materialize_grads=True)

        def forward(params: Tensor) -> Sequence[Tensor]:
            return _gradients(inner, rebuild)(params, *leaves)

        check_forward_mode(forward, reverse, [iterate.params], self, beside=leaves)

    def through_window(
        self,
        trajectory: Trajectory,
        end: WindowEnd,
        *,
        products_before: int = 0,
        remarks: Sequence[str] = (),
        **stats: Any,
    ) -> HypergradientResult:
        """The recursion from the end of the window, for estimators that fall back on it.

        Args:
            trajectory: The recorded run and its window.
            end: The end of the window; its gradient is used up.
            products_before: Hessian-vector products that were already taken.
            remarks: As of `make_result`.
            **stats: As of `make_result`.
        """
        inner = trajectory.inner
        recursion = BackwardRecursion(trajectory, end)
        step_back = _step_back if self.hvp == "reverse" else _step_back_forward
        if trajectory.in_blocks and not inner.has_step_loss:
            for block in trajectory.blocks_backward():
                recursion.step_through(block, step_back)
            steps: Iterable[tuple[int, Iterate, StepInputs]] = ()
        else:
            steps = recursion.steps()
        for step, iterate, inputs in steps:
            loss, cotangent, state_cotangents, input_cotangents = inner.run(
                step_back,
                inner,
                iterate.params,
                iterate.state,
                inputs,
                recursion.cotangent,
                recursion.state_cotangents,
            )
            end.gradient.pull(partition(inputs, needs_gradient)[0], input_cotangents)
            recursion.step_back(step, cotangent, state_cotangents, loss=loss)
        return recursion.result(
            hessian_vector_products=products_before + trajectory.window.width,
            remarks=remarks,
            **stats,
        )


def _of_short_run(trajectory: Trajectory, run: ShortRun) -> HypergradientResult:
    """dF/dφ from a run that was differentiated as it was made."""
    gradient, first = OuterGradient(trajectory), trajectory.first
    if run.cotangent is None:
        raise ProblemError(OUTER_LOSS_APART)
    gradient.add_of_loss(run.of_outer)
    steps = range(trajectory.window.stop)
    inputs = partition([trajectory.inputs[step] for step in steps], needs_gradient)[0]
    leaves = [first.params, *partition(first.state)[0], *inputs]
    pairs = [
        (leaf, slope)
        for leaf, slope in zip(leaves, [*run.of_start, *run.of_inputs], strict=True)
        if slope is not None
    ]
    gradient.pull([leaf for leaf, _ in pairs], [slope for _, slope in pairs])
    end = WindowEnd(gradient, run.end, run.loss, run.metrics, run.cotangent)
    return make_result(
        trajectory, end, hessian_vector_products=len(steps), method="one compiled graph"
    )


def _step_back(
    inner: InnerLoop,
    params: Tensor,
    state: Any,
    inputs: StepInputs,
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(ℓ, λ, μ, cotangents of the inputs) one step earlier: the step again, and autograd once."""
    state_leaves, rebuild_state = partition(state)
    input_leaves, rebuild_inputs = partition(inputs, needs_gradient)
    at = [leaf.detach().requires_grad_() for leaf in (params, *state_leaves, *input_leaves)]
    count = 1 + len(state_leaves)
    with torch.enable_grad():
        batch, hyperparameters = rebuild_inputs(at[count:])
        gradient, loss = inner.gradient_with_graph(at[0], batch)
        here = Iterate(at[0], rebuild_state(at[1:count]))
        after = inner.update(here, gradient, hyperparameters)
    pulled = pull(after, at, cotangent, state_cotangents)
    return loss.detach(), pulled[0], pulled[1:count], pulled[count:]


def _step_back_forward(
    inner: InnerLoop,
    params: Tensor,
    state: Any,
    inputs: StepInputs,
    cotangent: Tensor,
    state_cotangents: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """As `_step_back`, by a directional derivative of (∇_θ ℓ, ∇_b ℓ)."""
    batch_leaves, rebuild_batch = partition(inputs.batch, needs_gradient)
    # Forward mode cannot write to expanded tensors.
    batch_leaves = [leaf.detach().contiguous() for leaf in batch_leaves]
    gradient, loss = inner.gradient_without_graph(params, rebuild_batch(batch_leaves))
    through_update, state_cotangents, direction, hyper_cotangents = pull_update(
        inner, params, state, gradient, inputs.hyperparameters, cotangent, state_cotangents
    )

    tangents = (direction, *(torch.zeros_like(leaf) for leaf in batch_leaves))
    product, *mixed = torch.func.jvp(
        _gradients(inner, rebuild_batch), (params, *batch_leaves), tangents
    )[1]
    return loss, through_update + product, state_cotangents, [*mixed, *hyper_cotangents]


def _gradients(
    inner: InnerLoop, rebuild: Callable[[Sequence[Tensor]], Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """(θ, *leaves of b) ↦ (∇_θ ℓ, *∇_b ℓ), under any transform of `torch.func`."""

    def gradients(params: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        slope, slopes = torch.func.grad(
            lambda params, leaves: inner.loss(params, rebuild(leaves)), argnums=(0, 1)
        )(params, leaves)
        return slope, *slopes

    return gradients
