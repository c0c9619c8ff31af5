"""One distillation under way: the outer loop, and what is kept of it on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

import bilevel
from bilevel.distributed import AveragedHypergradient, gather, rank, world_size
from bilevel.tree import to_device
from dd.distillation.monitor import Monitor, Progress, png
from dd.distillation.state import TrainingState
from dd.evaluation.distilled_set import DistilledSet
from dd.objectives import HELD_OUT
from dd.objectives.base import Task
from dd.runtime.files import write_bytes
from dd.runtime.stopping import StopRequest

if TYPE_CHECKING:
    from dd.distillation.settings import Distiller

#: Outer steps in a row whose hypergradient may be non-finite (and is skipped) before giving up.
MOST_SKIPPED = 10
#: Wall clock between two checkpoints.
CHECKPOINT_SECONDS = 60.0
#: Names in a run's folder.
CHECKPOINT = "checkpoint.safetensors"
DISTILLED = "distilled.safetensors"
PICTURE = "distilled.png"
AVERAGE = Path("snapshots") / "average.safetensors"


@final
class Distillation:
    """Runs the outer loop: hypergradient, clipping, outer optimizer.

    Of several processes each has its own initialisations, windows and real images, keyed by
    (seed, rank, outer step). Their hypergradients are averaged, so all go through the same states;
    the first one keeps the time and the schedule, and writes.

    Args:
        settings: Of the outer loop.
        task: What to work on, and where.
        state: Where to begin; it is what changes.
    """

    def __init__(self, settings: Distiller, task: Task, state: TrainingState) -> None:
        self.settings = settings
        settings.precision.set_global_flags()
        self.task = task
        self.state = state
        self.key = task.key.fold("process", rank()) if rank() else task.key
        self.goal = settings.objective.prepare(settings, task, self.key)
        self.hypergradient = bilevel.Hypergradient(
            self.goal.problem,
            optimizer=settings.optimizer,
            steps=settings.inner_steps,
            truncation=state.truncation,
            estimator=settings.estimator,
            keep_every=settings.keep_every,
            keep_on=settings.keep_on,
            inner_replicas=settings.inner_replicas,
            compile=settings.compiles,
        )
        self.averaged = AveragedHypergradient(self.hypergradient)
        #: Names of profiles that were shown since they were last due.
        self._profiles_shown: set[str] = set()
        self._known_status = {"ok"}

    def run(self, stop: StopRequest, config_text: str) -> None:
        """Go on until all is done or `stop` is requested; the files are then up to date.

        Raises:
            bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient.
            bilevel.ProcessError: Another process failed or is gone.
        """
        state, settings, first = self.state, self.settings, rank() == 0
        monitor = Monitor(self.task.folder / "events" if first else None, first_step=state.step)
        progress = Progress(
            settings.outer_steps, settings.minutes, state.step, state.seconds, shown=first
        )
        try:
            monitor.config(config_text)
            if state.processes != world_size():
                progress.say(
                    f"note: this run had {state.processes} processes and goes on with "
                    f"{world_size()}, so each outer step now averages as many hypergradients"
                )
                state.processes = world_size()
            if state.step == 0:
                # Whatever ends the run from here on, it can be resumed.
                self._save()
                self._show(monitor)
            try:
                self._loop(stop, monitor, progress)
            except bilevel.NonFiniteError:
                self._save()
                raise
            self._save()
            self._show(monitor)
        finally:
            progress.close()
            monitor.close()

    def _loop(self, stop: StopRequest, monitor: Monitor, progress: Progress) -> None:
        state, settings = self.state, self.settings
        skipped, started = 0, False
        saved_at = time.monotonic()
        while not settings.finished(state) and not stop.agreed():
            seconds_before, began = state.seconds, time.perf_counter()
            try:
                self._step(monitor, progress)
                skipped = 0
                if not started:
                    started = True
                    progress.say(self._first_step(time.perf_counter() - began))
            except bilevel.NonFiniteError as error:
                skipped += 1
                if skipped == MOST_SKIPPED:
                    raise
                progress.say(f"outer step {state.step} skipped: {error}")
                state.step += 1
                state.seconds += time.perf_counter() - began
            self._follow_the_first()
            for minutes in settings.snapshot_minutes:
                if seconds_before < 60 * minutes <= state.seconds and rank() == 0:
                    name = f"{minutes:g}_minutes.safetensors"
                    self._distilled_set().save(self.task.folder / "snapshots" / name)
            if settings.validate_every and state.step % settings.validate_every == 0:
                self._validate(monitor)
            if state.step % settings.image_every == 0:
                self._show(monitor)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                self._save()
                saved_at = time.monotonic()

    def _first_step(self, seconds: float) -> str:
        compiler = self.hypergradient.inner.compiler
        compiling = "" if compiler is None else f", {compiler.seconds:.0f} of them compiling"
        return f"first outer step after {seconds:.0f} s{compiling}"

    def _step(self, monitor: Monitor, progress: Progress) -> None:
        """One outer step; if it raises, the outer variables are as they were."""
        state, task = self.state, self.task
        began = time.perf_counter()
        state.optimizer.zero_grad()
        given, outer_batch = self.goal.inputs(state.step, state.truncation.stage)
        result = self.averaged.backward(
            {**state.outer, **given}, outer_batch, self.key.generator("outer", state.step)
        )
        bound = None if state.clip is None else state.clip([state.outer["images"]])[1]
        state.optimizer.step()
        task.synthetic.constrain_(state.outer)
        if state.average is not None and self.settings.average_decay is not None:
            state.average.lerp_(state.outer["images"].detach(), 1 - self.settings.average_decay)
        metrics = {name: float(value) for name, value in result.metrics.items()}
        if HELD_OUT in state.truncation.metrics:
            metrics[HELD_OUT] = self.goal.held_out_accuracy(result.params)
        seconds = time.perf_counter() - began
        state.step += 1
        state.seconds += seconds
        share = self.settings.progress(state)
        news = state.truncation.update({"loss": float(result.loss), **metrics, "progress": share})
        monitor.outer_step(state.step, result, bound, seconds)
        monitor.scalars(state.step, self.goal.report(result))
        if HELD_OUT in metrics:
            monitor.scalars(state.step, {f"outer/{HELD_OUT}": metrics[HELD_OUT]})
        signals = {name: x for name, x in result.trace.items() if name != "inner_loss"}
        monitor.schedule(state.step, self._due({**state.truncation.report(), **signals}))
        # Once of each kind: the rest of a status may have numbers that change every time.
        kind = result.stats.status.split(":")[0]
        if kind not in self._known_status:
            self._known_status.add(kind)
            progress.say(f"outer step {state.step}, said once: {result.stats.status}")
        progress.update(state.step, state.seconds, float(result.loss), metrics)
        if news is not None:
            progress.say(f"outer step {state.step}: {news}")

    def _due(self, report: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
        """All numbers; a profile once after every `image_every` steps, as soon as it has all T."""
        if self.state.step % self.settings.image_every == 0:
            self._profiles_shown.clear()
        due: dict[str, Tensor | float] = {}
        for name, value in report.items():
            if not isinstance(value, Tensor):
                due[name] = value
            elif len(value) == self.settings.inner_steps and name not in self._profiles_shown:
                due[name] = value
                self._profiles_shown.add(name)
        return due

    def _follow_the_first(self) -> None:
        """Take over the first process's clock and the state of its schedule."""
        state = self.state
        schedule = to_device(state.truncation.state_dict(), torch.device("cpu"))
        state.seconds, schedule = gather((state.seconds, schedule))[0]
        if rank():
            state.truncation.load_state_dict(schedule)

    def _validate(self, monitor: Monitor) -> None:
        state, task = self.state, self.task
        candidates = {"validation/accuracy": state.outer["images"]}
        if state.average is not None:
            candidates["validation/accuracy_of_average"] = state.average
        found = {}
        for name, images in candidates.items():
            found[name] = task.evaluator.validation(
                self._composed(images),
                task.synthetic.labels(state.outer),
                task.network,
                task.data,
                task.key.fold("validation" if name == "validation/accuracy" else name, state.step),
                self.settings.objective.provenance(state.outer).get("learning_rate"),
            )
            if state.best_accuracy is None or found[name] > state.best_accuracy:
                state.best_accuracy, state.best_step = found[name], state.step
                self._keep(images)
        assert state.best_accuracy is not None, "there is at least one candidate"
        monitor.scalars(state.step, {**found, "validation/best_accuracy": state.best_accuracy})

    def _save(self) -> None:
        if rank():
            return
        self.state.save(self.task.folder / CHECKPOINT)
        if self.state.best_accuracy is None:
            self._keep()
        if self.state.average is not None:
            self._distilled_set(self.state.average).save(self.task.folder / AVERAGE)

    def _keep(self, images: Tensor | None = None) -> None:
        if rank():
            return
        kept = self._distilled_set(images)
        kept.save(self.task.folder / DISTILLED)
        picture = png(kept.pixels(), self.task.synthetic.images_per_class)
        write_bytes(self.task.folder / PICTURE, picture)

    def _show(self, monitor: Monitor) -> None:
        if rank():
            return
        pixels = self._distilled_set().pixels()
        monitor.images(self.state.step, pixels, self.task.synthetic.images_per_class)

    def _composed(self, images: Tensor) -> Tensor:
        """Whole images of learned ones, which may be in patches."""
        return self.task.synthetic.images({**self.state.outer, "images": images}).detach()

    def _distilled_set(self, images: Tensor | None = None) -> DistilledSet:
        """The set as it is now, or with other images for its own."""
        state, task = self.state, self.task
        return DistilledSet(
            images=self._composed(state.outer["images"] if images is None else images),
            labels=task.synthetic.labels(state.outer).detach(),
            transform=task.data.transform,
            class_names=task.data.class_names,
            provenance={
                **task.provenance,
                **self.settings.objective.provenance(state.outer),
                "outer_step": state.step,
                "seconds": state.seconds,
            },
        )
