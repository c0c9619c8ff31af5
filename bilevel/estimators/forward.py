"""The exact hypergradient by forward mode, for a few outer variables."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bilevel.estimators.base import Estimator, make_result
from bilevel.inner import InnerLoop
from bilevel.outer import OuterVariables
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate, Trajectory
from bilevel.tree import partition


@final
class Forward(Estimator):
    """Exact: carry Z_t = dθ_t/dφ (and the optimizer state's) forward along the window.

        Z_{t+1} = ∂Φ_t Z_t + ∂Φ_t/∂φ,      dF/dφ = Z_stopᵀ ∂F/∂θ + ∂F/∂φ

    Time grows with the number m of outer scalars (m forward-mode steps for each inner step) and
    memory with m·p, neither with the width of the window beyond that: right for up to about ten
    outer scalars (a learned rate, a few penalties), wrong for images. Everything that the problem
    computes, batches included, must have a forward derivative (`grid_sample` has none).
    """

    def __call__(
        self, inner: InnerLoop, trajectory: Trajectory, outer: Any, outer_batch: Any
    ) -> HypergradientResult:
        window, key = trajectory.window, trajectory.key
        variables = OuterVariables(outer)
        primals = tuple(leaf.detach() for leaf in variables.leaves)
        directions = _basis(primals)

        def start(*leaves: Tensor) -> tuple[Tensor, ...]:
            tree = variables.like(leaves)
            return _flat(inner.start(tree, key, inner.hyperparameters(tree)))

        iterate = inner.iterate_at(trajectory, outer, window.start)
        if window.start == 0:
            columns = [torch.func.jvp(start, primals, direction)[1] for direction in directions]
        else:
            columns = [tuple(map(torch.zeros_like, _flat(iterate))) for _ in directions]

        for step in range(window.start, window.stop):
            rebuild_state = partition(iterate.state)[1]

            def one_step(
                point: tuple[Tensor, ...],
                leaves: tuple[Tensor, ...],
                step: int = step,
                rebuild_state: Callable[[Sequence[Tensor]], Any] = rebuild_state,
            ) -> Iterate:
                tree = variables.like(leaves)
                batch = inner.batch(tree, step, key)
                here = Iterate(point[0], rebuild_state(point[1:]))
                return inner.step(here, batch, inner.hyperparameters(tree))

            columns = [
                torch.func.jvp(
                    lambda point, leaves: _flat(one_step(point, leaves)),
                    (_flat(iterate), primals),
                    (column, direction),
                )[1]
                for column, direction in zip(columns, directions, strict=True)
            ]
            with torch.no_grad():
                iterate = one_step(_flat(iterate), primals)

        loss, metrics, cotangent = variables.outer_loss_at(inner, iterate.params, outer_batch)
        products = torch.stack([column[0] @ cotangent for column in columns])
        for leaf, through_run in zip(
            variables.leaves, products.split([leaf.numel() for leaf in primals]), strict=True
        ):
            total = through_run.reshape(leaf.shape).to(leaf.dtype)
            leaf.grad = total if leaf.grad is None else leaf.grad + total
        return make_result(
            inner,
            trajectory,
            variables,
            loss=loss,
            metrics=metrics,
            stop_params=iterate.params,
            hessian_vector_products=window.width * len(directions),
        )


def _flat(iterate: Iterate) -> tuple[Tensor, ...]:
    """(θ, every differentiable leaf of s)."""
    return iterate.params, *partition(iterate.state)[0]


def _basis(leaves: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The unit tangents of a list of tensors, one for each scalar in it."""
    basis = []
    for index, leaf in enumerate(leaves):
        for position in range(leaf.numel()):
            tangents = [torch.zeros_like(other) for other in leaves]
            flat = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
            flat[position] = 1
            tangents[index] = flat.view(leaf.shape)
            basis.append(tuple(tangents))
    return basis
