"""One distillation under way: the outer loop, and what is kept of it on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

import bilevel
from dd.augmentation import Augmentation
from dd.checkpoint import TrainingState
from dd.data.prepared import PreparedData
from dd.distilled_set import DistilledSet
from dd.evaluation import Evaluator
from dd.files import write_bytes
from dd.monitor import Monitor
from dd.pictures import png
from dd.progress import Progress, StopRequest
from dd.synthetic import SyntheticDataset

if TYPE_CHECKING:
    from dd.distiller import Distiller

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
@dataclass(frozen=True)
class Job:
    """What one distillation works on; everything but the outer loop's own settings."""

    data: PreparedData
    network: nn.Module
    augmentation: Augmentation
    synthetic: SyntheticDataset
    evaluator: Evaluator
    folder: Path
    key: bilevel.Key
    device: torch.device
    provenance: dict[str, Any]
    description: dict[str, Any]


@final
class Distillation:
    """Runs the outer loop: hypergradient, clipping, outer optimizer.

    Args:
        settings: Of the outer loop.
        job: What to work on, and where.
        state: Where to begin; it is what changes.
    """

    def __init__(self, settings: Distiller, job: Job, state: TrainingState) -> None:
        self.settings = settings
        self.job = job
        self.state = state
        self.goal = settings.objective.prepare(settings, job)
        self.hypergradient = bilevel.Hypergradient(
            self.goal.problem,
            optimizer=settings.optimizer,
            steps=settings.inner_steps,
            truncation=state.truncation,
            estimator=settings.estimator,
            keep_every=settings.keep_every,
            keep_on=settings.keep_on,
        )

    def run(self, stop: StopRequest, config_text: str) -> None:
        """Go on until all is done or `stop` is requested; the files are then up to date.

        Raises:
            bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient.
        """
        state, settings = self.state, self.settings
        monitor = Monitor(self.job.folder / "events", first_step=state.step)
        progress = Progress(settings.outer_steps, settings.minutes, state.step, state.seconds)
        try:
            monitor.config(config_text)
            if state.step == 0:
                self._keep()
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
        skipped = 0
        saved_at = time.monotonic()
        while not settings.finished(state) and not stop.requested:
            seconds_before, began = state.seconds, time.perf_counter()
            try:
                self._step(monitor, progress)
                skipped = 0
            except bilevel.NonFiniteError as error:
                skipped += 1
                if skipped == MOST_SKIPPED:
                    raise
                progress.say(f"outer step {state.step} skipped: {error}")
                state.step += 1
                state.seconds += time.perf_counter() - began
            for minutes in settings.snapshot_minutes:
                if seconds_before < 60 * minutes <= state.seconds:
                    name = f"{minutes:g}_minutes.safetensors"
                    self._distilled_set().save(self.job.folder / "snapshots" / name)
            if settings.validate_every and state.step % settings.validate_every == 0:
                self._validate(monitor)
            if state.step % settings.image_every == 0:
                self._show(monitor)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                self._save()
                saved_at = time.monotonic()

    def _step(self, monitor: Monitor, progress: Progress) -> None:
        """One outer step; if it raises, the outer variables are as they were."""
        state, job = self.state, self.job
        began = time.perf_counter()
        state.optimizer.zero_grad()
        given, outer_batch = self.goal.inputs(state.step)
        result = self.hypergradient.backward(
            {**state.outer, **given}, outer_batch, job.key.generator("outer", state.step)
        )
        bound = None if state.clip is None else state.clip([state.outer["images"]])[1]
        state.optimizer.step()
        job.synthetic.constrain_(state.outer)
        if state.average is not None and self.settings.average_decay is not None:
            state.average.lerp_(state.outer["images"].detach(), 1 - self.settings.average_decay)
        loss = float(result.loss)
        metrics = {name: float(value) for name, value in result.metrics.items()}
        state.truncation.update({"loss": loss, **metrics})
        seconds = time.perf_counter() - began
        state.step += 1
        state.seconds += seconds
        monitor.outer_step(state.step, result, bound, seconds)
        monitor.scalars(state.step, self.goal.report(result))
        progress.update(state.step, state.seconds, loss, metrics)

    def _validate(self, monitor: Monitor) -> None:
        state, job = self.state, self.job
        candidates = {"validation/accuracy": state.outer["images"]}
        if state.average is not None:
            candidates["validation/accuracy_of_average"] = state.average
        found = {}
        for name, images in candidates.items():
            found[name] = job.evaluator.validation(
                images,
                job.synthetic.labels(state.outer),
                job.network,
                job.data,
                job.key.fold("validation" if name == "validation/accuracy" else name, state.step),
                self.settings.objective.provenance(state.outer).get("learning_rate"),
            )
            if state.best_accuracy is None or found[name] > state.best_accuracy:
                state.best_accuracy, state.best_step = found[name], state.step
                self._keep(images)
        assert state.best_accuracy is not None, "there is at least one candidate"
        monitor.scalars(state.step, {**found, "validation/best_accuracy": state.best_accuracy})

    def _save(self) -> None:
        self.state.save(self.job.folder / CHECKPOINT)
        if self.state.best_accuracy is None:
            self._keep()
        if self.state.average is not None:
            self._distilled_set(self.state.average).save(self.job.folder / AVERAGE)

    def _keep(self, images: Tensor | None = None) -> None:
        kept = self._distilled_set(images)
        kept.save(self.job.folder / DISTILLED)
        picture = png(kept.pixels(), self.job.synthetic.images_per_class)
        write_bytes(self.job.folder / PICTURE, picture)

    def _show(self, monitor: Monitor) -> None:
        pixels = self._distilled_set().pixels()
        monitor.images(self.state.step, pixels, self.job.synthetic.images_per_class)

    def _distilled_set(self, images: Tensor | None = None) -> DistilledSet:
        """The set as it is now, or with other images for its own."""
        state, job = self.state, self.job
        return DistilledSet(
            images=(state.outer["images"] if images is None else images).detach(),
            labels=job.synthetic.labels(state.outer).detach(),
            transform=job.data.transform,
            class_names=job.data.class_names,
            provenance={
                **job.provenance,
                **self.settings.objective.provenance(state.outer),
                "outer_step": state.step,
                "seconds": state.seconds,
            },
        )
