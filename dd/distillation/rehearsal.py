"""A run tried before it is begun: one outer step, and what the whole will take."""

from dataclasses import dataclass
from typing import final

from bilevel import Key
from dd.distillation.loop import Distillation, outer_step
from dd.distillation.progress import duration
from dd.objectives.base import Task
from dd.runtime.devices import device_name, peak_memory

#: A first outer step that took less is followed by a second one, which is timed instead.
QUICK = 10.0


@final
@dataclass(frozen=True)
class Rehearsal:
    """What a run will take.

    Attributes:
        first: Seconds of the first outer step.
        compiling: Seconds of it that were spent on compiling.
        step: Seconds of an outer step.
        distilling: Seconds until the last one.
        evaluating: Seconds of training networks afterwards, by what they are trained on.
        memory: The most bytes so far.
        device: The GPU's model, or "cpu".
    """

    first: float
    compiling: float
    step: float
    distilling: float
    evaluating: dict[str, float]
    memory: int
    device: str

    def lines(self) -> list[str]:
        """The same for people."""
        once = f", {duration(self.compiling)} of them compiling" if self.compiling else ""
        after = ", ".join(
            f"{duration(seconds)} on {name.replace('_', ' ')}"
            for name, seconds in self.evaluating.items()
        )
        where = "the process" if self.device == "cpu" else self.device
        return [
            f"first outer step: {self.first:.2f} s{once}; each after it: about {self.step:.2f} s",
            f"distilling: about {duration(self.distilling)}",
            f"then training networks: about {after}",
            f"memory: {self.memory / 2**30:.2f} GiB of {where}",
        ]


def rehearse(run: Distillation) -> Rehearsal:
    """Take an outer step, or two where they are quick, and keep nothing of it.

    Raises:
        bilevel.BilevelError: The step cannot be taken.
    """
    settings, state, task = run.settings, run.state, run.task
    before = state.seconds
    outer_step(run)
    first = state.seconds - before
    compiler = run.hypergradient.inner.compiler
    compiling = 0.0 if compiler is None else compiler.seconds
    each = first - compiling
    if first < QUICK and settings.outer_steps > 1:
        before = state.seconds
        outer_step(run)
        each = state.seconds - before
    distilling = first + (settings.outer_steps - 1) * each
    if settings.minutes is not None:
        distilling = min(distilling, max(60 * settings.minutes, first))
    return Rehearsal(
        first=first,
        compiling=compiling,
        step=each,
        distilling=distilling,
        evaluating=_evaluating(run, task),
        memory=peak_memory(task.device),
        device=device_name(task.device),
    )


def _evaluating(run: Distillation, task: Task) -> dict[str, float]:
    found = run.candidate("images")
    return task.evaluator.expected_seconds(
        found.images, found.labels, task.network, task.data, Key(0)
    )
