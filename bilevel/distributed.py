"""Several processes: each rolls its own inner runs, and all go on with the average.

They are those of `torch.distributed`'s default group, which the program initialises, for example
under `torchrun`. Without a group, or with one process in it, everything here is the identity.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, final

import optree
import torch

from bilevel.checks import check_instance
from bilevel.errors import NonFiniteError, ProcessError
from bilevel.hypergradient import Hypergradient
from bilevel.processes import (
    average,
    broadcast_,
    gather,
    given_up,
    hurry,
    rank,
    side_by_side,
    watched,
    world_size,
)
from bilevel.result import HypergradientResult, as_float
from bilevel.variables import add_to_grad, leaves_with_grad

__all__ = [
    "AveragedHypergradient",
    "average",
    "broadcast_",
    "gather",
    "given_up",
    "hurry",
    "rank",
    "side_by_side",
    "watched",
    "world_size",
]


@final
class AveragedHypergradient:
    """The mean of the hypergradients that the processes of a group compute side by side.

        dF/dφ = (1/N) Σ_r dF_r/dφ

    exactly, with the same bits in every process. An outer step that depends on nothing else then
    leaves the same outer variables everywhere, if it began with the same (`broadcast_`). In one
    process it is the hypergradient that it is given, and costs nothing.

    An error in one process is an error in all, so that none waits for ever: a `NonFiniteError`
    as such, to be skipped or not alike; any other as a `ProcessError` that names the process.

    Give every process a generator of its own, such as
    `Key(seed).fold(rank()).generator("outer", step)`, and a batch of its own; with the same ones,
    all compute the same hypergradient. A truncation schedule with state is each process's own,
    unless you hand that of process 0 to all of them (`gather`).

    Args:
        hypergradient: What each process computes.

    Raises:
        ConfigurationError: It is no `Hypergradient`.

    Example, under `torchrun --nproc_per_node=4`::

        torch.distributed.init_process_group()
        hypergradient = bilevel.distributed.AveragedHypergradient(hypergradient)
        for real_batch in own_part_of_the_data:
            outer_optimizer.zero_grad()
            result = hypergradient.backward(outer, real_batch, own_generator)
            outer_optimizer.step()
    """

    def __init__(self, hypergradient: Hypergradient) -> None:
        self.hypergradient = check_instance(
            "hypergradient", hypergradient, Hypergradient, "Hypergradient(problem, optimizer, 10)"
        )

    def __call__(
        self, outer: Any, outer_batch: Any = None, generator: torch.Generator | None = None
    ) -> HypergradientResult:
        """One averaged hypergradient; arguments as for `Hypergradient`.

        Returns:
            The result: `loss`, `grads` and `metrics` are means over the processes and
            `stats.hypergradient_norm` is the norm of the mean; all else is this process's own.

        Raises:
            NonFiniteError: The hypergradient of some process is not finite.
            ProcessError: Another process failed, is gone, or has other outer variables.
            BilevelError: What else `Hypergradient` raises in this process.
        """
        if world_size() == 1:
            return self.hypergradient(outer, outer_batch, generator)
        try:
            result = self.hypergradient(outer, outer_batch, generator)
        except Exception as error:
            with suppress(ProcessError):
                gather(
                    _Report(
                        error=f"{type(error).__name__}: {error}",
                        skippable=isinstance(error, NonFiniteError),
                    )
                )
            raise
        names = sorted(result.metrics)
        grads, spec = optree.tree_flatten(result.grads)
        tensors = [result.loss, *(as_float(result.metrics[name]) for name in names), *grads]
        layout = (tuple(names), tuple((tuple(t.shape), str(t.dtype)) for t in tensors))
        _check(gather(_Report(layout=layout)))
        loss, *rest = average(tensors)
        metrics, grads = rest[: len(names)], rest[len(names) :]
        norm = torch.nn.utils.get_total_norm(grads)
        return replace(
            result,
            loss=loss,
            grads=optree.tree_unflatten(spec, grads),
            metrics=dict(zip(names, metrics, strict=True)),
            stats=replace(result.stats, hypergradient_norm=norm),
        )

    def backward(
        self, outer: Any, outer_batch: Any = None, generator: torch.Generator | None = None
    ) -> HypergradientResult:
        """One averaged hypergradient, added to the `.grad` of every outer tensor.

        Raises:
            ProblemError: An outer tensor is not a leaf that requires gradients.
        """
        leaves = leaves_with_grad(outer)
        result = self(outer, outer_batch, generator)
        add_to_grad(leaves, result.grads)
        return result


@dataclass(frozen=True)
class _Report:
    """What one process tells the others before they average."""

    layout: Any = None
    error: str | None = None
    skippable: bool = False


def _check(reports: Sequence[_Report]) -> None:
    """Raise what went wrong in another process, if anything did."""
    failed = [(number, report) for number, report in enumerate(reports) if report.error]
    if failed:
        # One that cannot be skipped comes first: the others must not wait for that process.
        number, report = min(failed, key=lambda item: item[1].skippable)
        kind = NonFiniteError if report.skippable else ProcessError
        raise kind(f"process {number} of {len(reports)}: {report.error}")
    for number, report in enumerate(reports):
        if report.layout != reports[0].layout:
            raise ProcessError(
                f"process {number} has other metrics or outer variables (names, shapes, dtypes) "
                f"than process 0: {report.layout}, not {reports[0].layout}"
            )
