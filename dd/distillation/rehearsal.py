"""A run tried before it is begun: one outer step, and what the whole will take."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch.func import functional_call
from torch.nn import functional as F

from bilevel import Key, fresh_parameters
from dd.distillation.loop import Distillation, outer_step
from dd.objectives.base import Task
from dd.runtime.devices import device_name, peak_memory
from dd.runtime.plain import duration

#: A run on a CPU that takes longer than this, in seconds, is warned of.
LONG = 24 * 3600.0
#: After how many outer steps a run on a CPU is told that it takes too long.
STEPS_TO_WARN = 3
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


def rehearsed(run: Distillation, advice: str) -> Iterator[str]:
    """The same line by line, as soon as each is known.

    Args:
        run: The distillation, just begun.
        advice: What to do where a CPU will not finish it.
    """
    on_cpu = run.task.device.type == "cpu"
    if on_cpu and (least := least_seconds(run)) > LONG:
        yield warning_of_days(least, advice, at_least=True)
    yield "taking an outer step"
    found = rehearse(run)
    yield from found.lines()
    if on_cpu and found.distilling > LONG:
        yield warning_of_days(found.distilling, advice)
    yield "dry run: everything is built, and nothing was written"


def least_seconds(run: Distillation) -> float:
    """What a run takes at the very least, by the time of one inner step, of which it is known soon.

    Half of T such steps, forward and backward once, in every outer step: what a window may leave
    out is left out, and so are the way back and the outer loss.
    """
    settings, state, task = run.settings, run.state, run.task
    generator = Key(0).generator("timing")
    with torch.no_grad():
        images, labels = task.synthetic.batch(state.outer, generator)
    params = fresh_parameters(task.network, generator, device=task.device)
    leaves = [value.requires_grad_() for value in params.values()]
    seconds = 0.0
    for _ in range(2):  # the first one is slower
        began = time.perf_counter()
        loss = F.cross_entropy(functional_call(task.network, params, (images,)), labels)
        float(torch.autograd.grad(loss, leaves)[0].sum())
        seconds = time.perf_counter() - began
    least = (settings.outer_steps - state.step) * settings.inner_steps / 2 * seconds
    if settings.minutes is not None:
        least = min(least, 60 * settings.minutes - state.seconds)
    return least


def warning_of_days(seconds: float, advice: str, at_least: bool = False) -> str:
    """What a user is told of a run that takes so long on a CPU."""
    bound = "at least " if at_least else ""
    return f"warning: this run takes {bound}{duration(seconds)} on this CPU" + (
        f"; {advice}" if advice else ""
    )


def _evaluating(run: Distillation, task: Task) -> dict[str, float]:
    found = run.candidate("images")
    return task.evaluator.expected_seconds(
        found.images, found.labels, task.network, task.data, Key(0)
    )
