"""Several independent inner runs of one problem, side by side as one."""

from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.checks import check_instance, check_integer, check_scalar
from bilevel.problem import Problem, overrides
from bilevel.random import Key
from bilevel.result import as_float


@final
class Replicas(Problem):
    """R copies of a problem with their own initialisations and inner batches, run side by side.

        ℓ(θ₁ … θ_R, b₁ … b_R) = Σ_r ℓ(θ_r, b_r),    F(θ₁ … θ_R, φ) = (1/R) Σ_r F(θ_r, φ)

    and losses along the run like the one at its end. The first two go through `torch.func.vmap`,
    so each operation is done once for all R. The hypergradient is the mean of R independent ones:
    its variance over inner randomness is 1/R of one's. The inner optimizer must do to the stacked
    parameters what it would do to each replica's: clipping by the norm, which would clip the R
    gradients together, is refused. Recorded inner losses are sums over the replicas.

    Side by side wins where single operations are too small to fill the processor, as for a small
    network on a GPU, and loses where they are not, because convolutions with different weights
    become grouped ones; see `docs/performance.md`. Memory is that of R runs. The alternative is
    `Hypergradient(inner_replicas=R)`, one run after the other.

    Args:
        problem: What is replicated; its losses must work under `torch.func.vmap`, and its batches
            have the same shapes in every replica.
        count: R, at least 1.

    Raises:
        ConfigurationError: `problem` is no `Problem`, or `count` is below 1.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        self.problem = check_instance("problem", problem, Problem, "Replicas(MyProblem(), count=4)")
        self.count = check_integer("count", count)
        # Only what the problem has, since what there is of losses decides what is computed.
        if overrides(problem, "outer_loss"):
            self.outer_loss = self._outer_losses  # type: ignore[method-assign]
        if overrides(problem, "step_loss"):
            self.step_loss = self._step_losses  # type: ignore[method-assign]

    def init(self, outer: Any, *, generator: torch.Generator) -> Any:
        return self._stacked(
            [self.problem.init(outer, generator=g) for g in self._split(generator)]
        )

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Any:
        return self._stacked(
            [self.problem.inner_batch(outer, step, generator=g) for g in self._split(generator)]
        )

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        return torch.func.vmap(self.problem.inner_loss)(params, batch).sum()

    def _outer_losses(
        self, params: Any, outer: Any, batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def one(params: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value = self.problem.outer_loss(params, outer, batch)
            assert value is not None, "looked at when this was made"
            loss, metrics = value if isinstance(value, tuple) else (value, {})
            return loss, {name: torch.as_tensor(metric) for name, metric in metrics.items()}

        loss, metrics = torch.func.vmap(one)(params)
        return loss.mean(), {name: as_float(value).mean(0) for name, value in metrics.items()}

    def _step_losses(
        self, params: Any, outer: Any, step: int, *, generator: torch.Generator
    ) -> Tensor:
        losses = []
        for index, own in enumerate(self._split(generator)):
            replica = optree.tree_map(lambda leaf, index=index: leaf[index], params)
            loss = self.problem.step_loss(replica, outer, step, generator=own)
            losses.append(check_scalar(loss, "step_loss"))
        return torch.stack(losses).mean()

    def hyperparameters(self, outer: Any, step: int) -> Any:
        return self.problem.hyperparameters(outer, step)

    def _split(self, generator: torch.Generator) -> list[torch.Generator]:
        key = Key.draw(generator)
        return [key.generator("replica", index) for index in range(self.count)]

    def _stacked(self, trees: list[Any]) -> Any:
        return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
