"""The exact hypergradient by plain autograd through the graph of the whole window."""

from typing import Any, final

import torch

from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.repeatable import Kept
from bilevel.result import HypergradientResult
from bilevel.trajectory import Trajectory
from bilevel.unrolled import Unrolled


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
    leaves = trajectory.variables.leaves
    end = WindowEnd.of(trajectory, outer_batch)
    outputs, cotangents = list(unrolled.points[-1]), unrolled.like(end.cotangent)
    losses = [end.loss]
    if inner.has_step_loss:
        for index, step in enumerate(range(window.start, window.stop), start=1):
            with torch.enable_grad():
                loss = inner.step_loss(
                    unrolled.flat(index), trajectory.variables.tree, step, trajectory.key
                )
            losses.append(loss.detach().to(end.loss))
            if loss.requires_grad:
                outputs.append(loss)
                cotangents.append(torch.ones_like(loss))
    # Only what is asked for: were iterates among it, autograd could add nothing up in place.
    end.gradient.add(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))
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
