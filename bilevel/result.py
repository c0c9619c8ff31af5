"""What a hypergradient call returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.trajectory import Trace, Window


@dataclass(frozen=True)
class SolverStats:
    """How the linear system of an implicit estimator was solved.

    Attributes:
        status: "converged", or a sentence that says what went wrong.
        iterations: Iterations of the solver; 0 for a direct one. The most over all tasks.
        residual: ‖b − Ax‖₂ / ‖b‖₂, measured by one more product at the end. The worst of all tasks.
    """

    status: str
    iterations: int
    residual: float


@dataclass(frozen=True)
class LowRankStats:
    """How `LowRank` came to its result.

    Attributes:
        spectrum: Eigenvalues of the low-rank Hessian, by falling magnitude, shape [rank]; those of
            `Krylov` are in units of one over the response of θ to the gradient. Empty where the
            exact recursion was used instead.
        evaluations: Passes backward through the graph of an inner gradient: Hessian-vector
            products, mixed products, and what measuring the staleness took. `Adjoint` takes as
            many as the window has steps.
        staleness: max ‖H'u − Hu‖₂ / ‖Hu‖₂ over the Hessians H' at both ends of the window, with H
            at its middle. None where it was not measured.
        exact: Whether the exact recursion was used instead; the status says why.
    """

    spectrum: Tensor
    evaluations: int
    staleness: float | None
    exact: bool

    @property
    def rank(self) -> int:
        """The rank of the Hessian that was used."""
        return len(self.spectrum)


@dataclass(frozen=True)
class Stats:
    """What one debugs a hypergradient with.

    Attributes:
        status: "ok", or a sentence that says what to know about this result.
        hypergradient_norm: ‖dF/dφ‖₂ over all outer variables, a scalar tensor.
        hessian_vector_products: How many products with the inner Hessian were computed.
        cotangent_norms: ‖λ_t‖₂ for t = start … stop, where λ_t = dF/dθ_t; shape [width + 1]. None
            where the estimator has no such quantity.
        solver: How an implicit estimator's linear system was solved.
        outer_loss_gap: F(θ*) − F(θ_stop) to first order, where θ* is the point to which the inner
            run tends: how far from converged it was, in units of the outer loss. A scalar tensor,
            of implicit estimators only.
        standard_error: Estimated standard deviation of the hypergradient's error, ‖·‖₂ over all
            outer variables, from the spread of its samples. A scalar tensor, of estimators that
            sample more than once.
        low_rank: How `LowRank` came to its result.
        method: How the window was differentiated where there is a choice: by the "recorded graph",
            or by the "recursion" and why.
    """

    status: str
    hypergradient_norm: Tensor
    hessian_vector_products: int
    cotangent_norms: Tensor | None = None
    solver: SolverStats | None = None
    outer_loss_gap: Tensor | None = None
    standard_error: Tensor | None = None
    low_rank: LowRankStats | None = None
    method: str = ""


@dataclass(frozen=True)
class HypergradientResult:
    """The outer loss and its derivative. No tensor in it has a graph.

    Attributes:
        loss: F(θ_stop, φ), a scalar tensor.
        grads: dF/dφ, a pytree like the outer variables.
        window: The inner steps that were differentiated.
        stats: Diagnostics.
        params: θ_stop, a pytree like the one that `Problem.init` returns.
        metrics: What `Problem.outer_loss` reported beside the loss.
        trace: Per-step signals of the inner run.
    """

    loss: Tensor
    grads: Any
    window: Window
    stats: Stats
    params: Any
    trace: Trace
    metrics: dict[str, Tensor] = field(default_factory=dict)


def mean(results: Sequence[HypergradientResult]) -> HypergradientResult:
    """The mean of several results over one window, with the first one's parameters and trace."""
    first = results[0]
    grads = optree.tree_map(
        lambda *leaves: torch.stack(leaves).mean(0), *(each.grads for each in results)
    )
    low_rank = [each.stats.low_rank for each in results if each.stats.low_rank is not None]
    others = [each.stats.status for each in results if each.stats.status != "ok"]
    stats = replace(
        first.stats,
        status="; ".join(dict.fromkeys(others)) or "ok",
        hypergradient_norm=torch.nn.utils.get_total_norm(optree.tree_leaves(grads)),
        hessian_vector_products=sum(each.stats.hessian_vector_products for each in results),
        low_rank=_over_all(low_rank) if low_rank else None,
    )
    return replace(
        first,
        loss=torch.stack([each.loss for each in results]).mean(),
        grads=grads,
        stats=stats,
        metrics={
            name: torch.stack([each.metrics[name] for each in results]).mean()
            for name in first.metrics
        },
    )


def _over_all(runs: Sequence[LowRankStats]) -> LowRankStats:
    """The first run's spectrum, the passes of all, the worst staleness; exact if any run was."""
    staleness = [each.staleness for each in runs if each.staleness is not None]
    return LowRankStats(
        runs[0].spectrum,
        sum(each.evaluations for each in runs),
        max(staleness, default=None),
        any(each.exact for each in runs),
    )
