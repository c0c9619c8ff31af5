"""What a hypergradient call returns."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import NonFiniteError, ProblemError
from bilevel.recording.trajectory import Trace
from bilevel.window import Window


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
            where the estimator has no such quantity, and of a recorded graph, where asking for them
            would cost time: `graph_budget=0` gives them.
        solver: How an implicit estimator's linear system was solved.
        outer_loss_gap: F(θ*) − F(θ_stop) to first order, where θ* is the point to which the inner
            run tends: how far from converged it was, in units of the outer loss. A scalar tensor,
            of implicit estimators only.
        standard_error: Estimated standard deviation of the hypergradient's error, ‖·‖₂ over all
            outer variables. A scalar tensor: with `inner_replicas`, from their spread; else from
            that of the samples, of estimators that sample more than once.
        low_rank: How `LowRank` came to its result.
        penalty: λ, by which the inner objective is weighted against the outer one, of estimators
            that descend on both.
        method: How the window was differentiated where there is a choice: by the "recorded graph",
            or by the "recursion" and why.
        seconds: Wall clock of the "rollout", the "selection" of the window and the way "backward",
            which begins with the outer loss. Nothing waits for a device to be measured, so work
            that a GPU was given in one part may be counted to a later one, which needs its result.
    """

    status: str
    hypergradient_norm: Tensor
    hessian_vector_products: int
    cotangent_norms: Tensor | None = None
    solver: SolverStats | None = None
    outer_loss_gap: Tensor | None = None
    standard_error: Tensor | None = None
    low_rank: LowRankStats | None = None
    penalty: float | None = None
    method: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


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


def check_finite(result: HypergradientResult) -> None:
    """Raise if anything is not finite, saying where along the run it began."""
    if bool(torch.isfinite(result.loss + result.stats.hypergradient_norm)):
        return
    window = result.window
    bad = (~torch.isfinite(result.trace["inner_loss"])).nonzero()
    if len(bad):
        step = int(bad[0])
        raise NonFiniteError(
            f"the inner loss became {float(result.trace['inner_loss'][step])} at inner step {step} "
            f"of {result.trace.horizon}: lower the inner learning rate or look at the inner batch"
        )
    if not bool(torch.isfinite(result.loss)):
        raise NonFiniteError(
            f"the outer loss is {float(result.loss)} at inner step {window.stop}, though every "
            "inner loss before it is finite: look at outer_loss and its batch"
        )
    norms = result.stats.cotangent_norms
    bad = (~torch.isfinite(torch.zeros(0) if norms is None else norms)).nonzero()
    where = ""
    if len(bad):
        where = (
            f"; going backward over [{window.start}, {window.stop}), the cotangent is not finite "
            f"from inner step {window.start + int(bad[-1])} on"
        )
    elif norms is None and result.stats.method:
        where = " (graph_budget=0 says from which inner step on)"
    raise NonFiniteError(
        f"the hypergradient's norm is {float(result.stats.hypergradient_norm)}{where}: shorten "
        "the window, lower the inner learning rate, or raise the optimizer's eps_root"
    )


def mean(results: Sequence[HypergradientResult]) -> HypergradientResult:
    """The mean of the results of several independent runs over one window.

    The standard error is that of the mean, from the spread over the runs: it covers all that is
    random in them. Solver and low-rank numbers are the worst of all runs, products their sum;
    parameters, trace, cotangent norms and penalty are those of the first.

    Raises:
        ProblemError: A metric has not the same shape in all runs.
    """
    first, stats = results[0], [each.stats for each in results]
    stacked = optree.tree_map(
        lambda *leaves: torch.stack(leaves), *(each.grads for each in results)
    )
    grads = optree.tree_map(lambda leaf: leaf.mean(0), stacked)
    variances = [leaf.var(0).sum() / len(results) for leaf in optree.tree_leaves(stacked)]
    gaps = [each.outer_loss_gap for each in stats if each.outer_loss_gap is not None]
    low_rank = [each.low_rank for each in stats if each.low_rank is not None]
    solvers = [each.solver for each in stats if each.solver is not None]
    return replace(
        first,
        loss=torch.stack([each.loss for each in results]).mean(),
        grads=grads,
        stats=replace(
            first.stats,
            status=_status_of_all([each.status for each in stats]),
            hypergradient_norm=torch.nn.utils.get_total_norm(optree.tree_leaves(grads)),
            hessian_vector_products=sum(each.hessian_vector_products for each in stats),
            solver=_worst(solvers) if solvers else None,
            outer_loss_gap=torch.stack(gaps).mean() if gaps else None,
            standard_error=torch.stack(variances).sum().sqrt() if len(results) > 1 else None,
            low_rank=_combined_low_rank(low_rank) if low_rank else None,
        ),
        metrics=_mean_metrics([each.metrics for each in results]),
    )


def as_float(metric: Tensor) -> Tensor:
    """A metric that can be averaged: a count or a truth value as a number."""
    return metric if metric.is_floating_point() else metric.to(torch.get_default_dtype())


def _mean_metrics(runs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every metric over the runs that reported it, entry by entry."""
    found: dict[str, list[Tensor]] = {}
    for metrics in runs:
        for name, value in metrics.items():
            found.setdefault(name, []).append(as_float(value))
    for name, values in found.items():
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ProblemError(
                f"the metric {name!r} of outer_loss has the shapes {sorted(shapes)} in different "
                "inner runs, so it has no mean: report something of one shape"
            )
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def _status_of_all(statuses: Sequence[str]) -> str:
    """Every sentence once, with how many runs it is about if not all."""
    remarks = [
        status if count == len(statuses) else f"{status} (in {count} of {len(statuses)} inner runs)"
        for status, count in Counter(statuses).items()
        if status != "ok"
    ]
    return "; ".join(remarks) or "ok"


def _worst(runs: Sequence[SolverStats]) -> SolverStats:
    """The status of the worst residual, and the most iterations."""
    worst = max(runs, key=lambda run: run.residual)
    return replace(worst, iterations=max(run.iterations for run in runs))


def _combined_low_rank(runs: Sequence[LowRankStats]) -> LowRankStats:
    """The first run's spectrum, the passes of all, the worst staleness; exact if any run was."""
    staleness = [each.staleness for each in runs if each.staleness is not None]
    return LowRankStats(
        runs[0].spectrum,
        sum(each.evaluations for each in runs),
        max(staleness, default=None),
        any(each.exact for each in runs),
    )
