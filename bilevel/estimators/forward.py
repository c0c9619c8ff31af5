"""The hypergradient by forward mode: exact for a few outer variables, else sampled."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_integer
from bilevel.contract.derivatives import check_forward_mode
from bilevel.errors import ProblemError
from bilevel.estimators.base import Estimator, WindowEnd, make_result
from bilevel.estimators.evolution_strategies import set_to_mean
from bilevel.estimators.tangents import random_signs, unit_tangents
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.trajectory import Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import partition
from bilevel.variables import Iterate, OuterVariables, StepInputs


@final
class Forward(Estimator):
    """Carry the derivative z_t of θ_t (and of the optimizer's state) along a direction v of φ
    forward through the window, for several v side by side:

        z_{t+1} = ∂Φ_t z_t + ∂Φ_t/∂φ v,      ⟨dF/dφ, v⟩ = ⟨∂F/∂θ, z_stop⟩ + ⟨∂F/∂φ, v⟩

    and the same at every step for losses along the run. Time is that of k forward-mode steps for
    each inner step, memory k copies of θ, with k the number of directions, whatever the width of
    the window. Everything that the problem computes, batches included, must have a forward
    derivative (`grid_sample` has none).

    Exact for: `directions=None`, all m unit directions: right for up to about ten outer scalars (a
    learned rate, a few penalties), wrong for images. With `directions=k` they are random signs, and

        dF/dφ ≈ ∂F/∂φ + 1/k Σᵢ vᵢ ⟨g, vᵢ⟩,      g = dF/dφ − ∂F/∂φ

    is unbiased, since E vvᵀ = I, with a variance of (m − 1)/k · ‖g‖², summed over the m outer
    scalars: a direction at best below k = m, and exact at any k for a single scalar. An outer
    variable that nothing depends on then gets noise, not an error.

    Args:
        directions: k ≥ 1; None: all of them.

    Raises:
        ConfigurationError: `directions` is neither.

    Source: Williams and Zipser, Neural Computation 1 (1989), 270–280; Franceschi et al.,
    arXiv 1703.01785; with random directions, Shen et al. ((FG)²U), arXiv 2406.14095.
    """

    runs_again = True

    def __init__(self, directions: int | None = None) -> None:
        self.directions = None if directions is None else check_integer("directions", directions)
        if self.directions is not None:
            self.leaves_out = f"it is sampled along {self.directions} random directions"

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
        if self.directions is None:
            directions = unit_tangents(primals)
        else:
            directions = random_signs(primals, self.directions, key.fold("directions"))

        def start(*leaves: Tensor) -> tuple[Tensor, ...]:
            tree = variables.like(leaves)
            return _tensors_of(inner.start(tree, key, inner.hyperparameters(tree, 0)))

        end = WindowEnd.of(trajectory, outer_batch)
        iterate = trajectory.iterate_at(window.start)
        if window.start == 0:
            columns = [torch.func.jvp(start, primals, direction)[1] for direction in directions]
        else:
            columns = [tuple(map(torch.zeros_like, _tensors_of(iterate))) for _ in directions]

        def along(slope: Tensor) -> Tensor:
            """⟨slope, z⟩ for every direction."""
            return torch.stack([column[0] @ slope for column in columns])

        losses, products = [end.loss], end.cotangent.new_zeros(len(directions))
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
                products = products + along(slope)
        _check_same_end(iterate.params, end.iterate.params)
        products = products + along(end.cotangent)
        parts = [
            [product.to(v) * v for v in direction]
            for product, direction in zip(products, directions, strict=True)
        ]
        error = None
        if self.directions is None:
            end.gradient.add([torch.stack(part).sum(0) for part in zip(*parts, strict=True)])
        else:
            error = set_to_mean(end.gradient, parts)
        return make_result(
            trajectory,
            end,
            loss=torch.stack(losses).sum(),
            hessian_vector_products=window.width * len(directions),
            standard_error=error,
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
