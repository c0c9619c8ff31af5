"""The exact hypergradient by plain autograd through the graph of the whole window."""

from dataclasses import replace
from typing import Any, final

import torch

from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.recording import step_with_graph
from bilevel.result import HypergradientResult
from bilevel.trajectory import Trajectory


@final
class Reverse(Estimator):
    """Exact: autograd through the graph of all steps of the window at once, whatever its size.

    The reference that the others are judged by. Its memory grows by the graph of one inner step
    for every step of the window. `Adjoint` does the same where that fits a budget, and gives the
    same numbers in flat memory where it does not.
    """

    uses_graph = True

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        if not trajectory.has_graph:
            trajectory = _recorded_again(trajectory)
        return through_graph(trajectory, outer_batch)


def through_graph(trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
    """dF/dφ by autograd through the graph that the window was recorded with."""
    window, key, inner = trajectory.window, trajectory.key, trajectory.inner
    tree, leaves = trajectory.variables.tree, trajectory.variables.leaves
    end = WindowEnd.of(trajectory, outer_batch)
    points = [trajectory.graphs[step].params for step in range(window.start, window.stop + 1)]
    outputs, cotangents, losses = [points[-1]], [end.cotangent], [end.loss]
    if inner.has_step_loss:
        for step, params in enumerate(points[1:], start=window.start):
            with torch.enable_grad():
                loss = inner.step_loss(params, tree, step, key)
            losses.append(loss.detach().to(end.loss))
            if loss.requires_grad:
                outputs.append(loss)
                cotangents.append(torch.ones_like(loss))
    found = torch.autograd.grad(outputs, [*leaves, *points], cotangents, allow_unused=True)
    end.gradient.add(found[: len(leaves)])
    slopes = [
        torch.zeros_like(params) if slope is None else slope
        for slope, params in zip(found[len(leaves) :], points, strict=True)
    ]
    return make_result(
        trajectory,
        end,
        loss=torch.stack(losses).sum(),
        hessian_vector_products=window.width,
        cotangent_norms=torch.stack([torch.linalg.vector_norm(slope) for slope in slopes]),
        method="recorded graph",
    )


def _recorded_again(trajectory: Trajectory) -> Trajectory:
    """The same recording with the graph of its window, which is run once more."""
    window, inner = trajectory.window, trajectory.inner
    iterate = trajectory.first if window.start == 0 else trajectory.iterate_at(window.start)
    if not iterate.params.requires_grad:
        iterate = replace(iterate, params=iterate.params.detach().requires_grad_())
    graphs, losses = {window.start: iterate}, {}
    for step in range(window.start, window.stop):
        inputs = trajectory.inputs_at(step)
        iterate, _, scalars = step_with_graph(inner, iterate, inputs)
        graphs[step + 1], losses[step] = iterate, scalars["inner_loss"]
    trajectory.check_repeated(losses)
    return replace(trajectory, graphs=graphs)
