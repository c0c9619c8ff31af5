"""The exact hypergradient by forward mode, for a few outer variables."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.contract.derivatives import check_forward_mode
from bilevel.errors import ProblemError
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import partition
from bilevel.variables import Iterate, OuterVariables, StepInputs


@final
class Forward(Estimator):
    """Exact: carry Z_t = dθ_t/dφ (and the optimizer state's) forward along the window.

        Z_{t+1} = ∂Φ_t Z_t + ∂Φ_t/∂φ,      dF/dφ = Z_stopᵀ ∂F/∂θ + ∂F/∂φ

    and the same at every step for losses along the run. Time grows with the number m of outer
    scalars (m forward-mode steps for each inner step) and memory with m·p, neither with the width
    of the window beyond that: right for up to about ten outer scalars (a learned rate, a few
    penalties), wrong for images. Everything that the problem computes, batches included, must have
    a forward derivative (`grid_sample` has none).
    """

    runs_again = True

    def check_step(
        self,
        inner: InnerLoop,
        variables: OuterVariables,
        key: Key,
        iterate: Iterate,
        inputs: StepInputs,
    ) -> None:
        point, rebuild = _tensors_of(iterate), partition(iterate.state)[1]

        def step(at: Sequence[Tensor], *, by_reverse: bool) -> tuple[Tensor, ...]:
            here = Iterate(at[0], rebuild(at[1 : len(point)]))
            inputs = inner.inputs(variables.like(at[len(point) :]), 0, key)
            if not by_reverse:
                return _tensors_of(inner.step(here, inputs))
            gradient, _ = inner.gradient_with_graph(here.params, inputs.batch)
            return _tensors_of(inner.update(here, gradient, inputs.hyperparameters))

        check_forward_mode(
            lambda *at: step(at, by_reverse=False),
            lambda *at: step(at, by_reverse=True),
            [*point, *variables.leaves],
            self,
        )

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        window, key, inner = trajectory.window, trajectory.key, trajectory.inner
        variables = trajectory.variables
        primals = tuple(leaf.detach() for leaf in variables.leaves)
        directions = _unit_tangents(primals)

        def start(*leaves: Tensor) -> tuple[Tensor, ...]:
            tree = variables.like(leaves)
            return _tensors_of(inner.start(tree, key, inner.hyperparameters(tree, 0)))

        end = WindowEnd.of(trajectory, outer_batch)
        iterate = trajectory.iterate_at(window.start)
        if window.start == 0:
            columns = [torch.func.jvp(start, primals, direction)[1] for direction in directions]
        else:
            columns = [tuple(map(torch.zeros_like, _tensors_of(iterate))) for _ in directions]

        def gather(slope: Tensor) -> None:
            products = torch.stack([column[0] @ slope for column in columns])
            pieces = products.split([leaf.numel() for leaf in primals])
            end.gradient.add(
                [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, primals, strict=True)]
            )

        losses = [end.loss]
        for step in range(window.start, window.stop):
            rebuild_state = partition(iterate.state)[1]

            def one_step(
                point: tuple[Tensor, ...],
                leaves: tuple[Tensor, ...],
                step: int = step,
                rebuild_state: Callable[[Sequence[Tensor]], Any] = rebuild_state,
            ) -> Iterate:
                here = Iterate(point[0], rebuild_state(point[1:]))
                return inner.step(here, inner.inputs(variables.like(leaves), step, key))

            columns = [
                torch.func.jvp(
                    lambda point, leaves: _tensors_of(one_step(point, leaves)),
                    (_tensors_of(iterate), primals),
                    (column, direction),
                )[1]
                for column, direction in zip(columns, directions, strict=True)
            ]
            with torch.no_grad():
                iterate = one_step(_tensors_of(iterate), primals)
            if inner.has_step_loss:
                loss, slope = end.gradient.step_loss_at(iterate.params, step)
                losses.append(loss.to(end.loss))
                gather(slope)
        _check_same_end(iterate.params, end.iterate.params)
        gather(end.cotangent)
        return make_result(
            trajectory,
            end,
            loss=torch.stack(losses).sum(),
            hessian_vector_products=window.width * len(directions),
        )


def _check_same_end(again: Tensor, recorded: Tensor) -> None:
    """Raise if the window, run again, ends elsewhere."""
    distance = torch.linalg.vector_norm(again - recorded)
    size = torch.linalg.vector_norm(recorded)
    if bool(distance > torch.finfo(recorded.dtype).eps ** 0.5 * size):
        raise ProblemError(
            "inner_batch or inner_loss is not the same when it is run again: the window then "
            f"ends {float(distance / size):.1e} of ‖θ‖ from where it was recorded "
            "(docs/contract.md)"
        )


def _tensors_of(iterate: Iterate) -> tuple[Tensor, ...]:
    """(θ, every differentiable leaf of s)."""
    return iterate.params, *partition(iterate.state)[0]


def _unit_tangents(leaves: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The unit tangents of a list of tensors, one for each scalar in it."""
    tangents_of_all = []
    for index, leaf in enumerate(leaves):
        for position in range(leaf.numel()):
            tangents = [torch.zeros_like(other) for other in leaves]
            flat = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
            flat[position] = 1
            tangents[index] = flat.view(leaf.shape)
            tangents_of_all.append(tuple(tangents))
    return tangents_of_all
