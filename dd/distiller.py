"""The outer loop: hypergradient, clipping, outer optimizer, and what is kept of it on disk."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

import bilevel
from bilevel.clip import MovingAverageClip
from dd.augmentation import Augmentation
from dd.checkpoint import TrainingState
from dd.checks import check_instance, check_integer, check_number
from dd.data.prepared import PreparedData, RealBatches
from dd.distilled_set import DistilledSet
from dd.evaluation import Evaluator
from dd.monitor import Monitor
from dd.problems import MetaLoss
from dd.progress import Progress, StopRequest
from dd.synthetic import SyntheticDataset

#: Outer steps in a row whose hypergradient may be non-finite (and is skipped) before giving up.
MOST_SKIPPED = 10
#: Wall clock between two checkpoints.
CHECKPOINT_SECONDS = 60.0
#: Names in a run's folder.
CHECKPOINT = "checkpoint.safetensors"
DISTILLED = "distilled.safetensors"


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
    provenance: dict[str, Any]


@final
class Distiller:
    """Learn a synthetic set by gradient descent on the outer loss.

    Args:
        outer_steps: Outer steps to do.
        minutes: Stop after this much wall clock in outer steps, if that comes first. Validation
            and evaluation are not counted.
        inner_steps: T, the length of a full inner run.
        truncation: Which inner steps are differentiated.
        optimizer: The inner optimizer, a gradient transformation.
        estimator: How they are differentiated; default: `Adjoint`.
        keep_every: See `bilevel.Hypergradient`.
        real_batch: Real images in the outer loss.
        real_micro_batch: How many of them are in memory with a graph at a time.
        image_lr: Outer Adam's rate for the images.
        label_lr: Outer Adam's rate for learned labels.
        clip: Clipping of the images' hypergradient; default: none.
        validate_every: Outer steps between looks at the validation accuracy; the best set seen is
            the one that is kept. 0: no looks, the last set is kept.
        image_every: Outer steps between pictures in TensorBoard.
        snapshot_minutes: Wall-clock times at which the set is also kept under `snapshots/`.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        outer_steps: int,
        inner_steps: int,
        truncation: bilevel.truncation.Truncation,
        optimizer: Any,
        minutes: float | None = None,
        estimator: bilevel.estimators.Estimator | None = None,
        keep_every: int = 1,
        real_batch: int = 5000,
        real_micro_batch: int = 1000,
        image_lr: float = 1e-3,
        label_lr: float = 1e-3,
        clip: MovingAverageClip | None = None,
        validate_every: int = 0,
        image_every: int = 100,
        snapshot_minutes: Sequence[float] = (),
    ) -> None:
        for name, value, minimum in (
            ("outer_steps", outer_steps, 1),
            ("inner_steps", inner_steps, 1),
            ("keep_every", keep_every, 1),
            ("real_batch", real_batch, 1),
            ("real_micro_batch", real_micro_batch, 1),
            ("validate_every", validate_every, 0),
            ("image_every", image_every, 1),
        ):
            check_integer(name, value, minimum)
        if minutes is not None:
            check_number("minutes", minutes, above=0)
        check_number("image_lr", image_lr, above=0)
        check_number("label_lr", label_lr, above=0)
        check_instance(
            "truncation", truncation, bilevel.truncation.Truncation, "@RandomWindow() with ()"
        )
        if inner_steps < truncation.minimum_steps:
            raise ValueError(
                f"inner_steps={inner_steps}: {type(truncation).__name__} needs at least "
                f"{truncation.minimum_steps}, the width of its window"
            )
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ValueError(f"optimizer={optimizer!r}: write for example @adam() with ()")
        if estimator is not None:
            check_instance(
                "estimator", estimator, bilevel.estimators.Estimator, "@Adjoint() with ()"
            )
        if clip is not None:
            check_instance("clip", clip, MovingAverageClip, "@MovingAverageClip() with ()")
        if not isinstance(snapshot_minutes, (list, tuple)):
            raise ValueError(f"snapshot_minutes={snapshot_minutes!r}: it must be a list of minutes")
        for minute in snapshot_minutes:
            check_number("snapshot_minutes", minute, above=0)
        self.outer_steps = outer_steps
        self.minutes = minutes
        self.inner_steps = inner_steps
        self.truncation = truncation
        self.optimizer = optimizer
        self.estimator = estimator
        self.keep_every = keep_every
        self.real_batch = real_batch
        self.real_micro_batch = real_micro_batch
        self.image_lr = image_lr
        self.label_lr = label_lr
        self.clip = clip
        self.validate_every = validate_every
        self.image_every = image_every
        self.snapshot_minutes = sorted(snapshot_minutes)

    def distil(
        self, job: Job, stop: StopRequest, config_text: str, on_start: Callable[[], None]
    ) -> TrainingState:
        """Run, or go on from the checkpoint in `job.folder`, until done or asked to stop.

        Returns:
            The state at the end. The distilled set is in `DISTILLED`.

        Raises:
            bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient.
            DamagedFileError: The checkpoint cannot be used.
        """
        state = self.initial_state(job)
        if (job.folder / CHECKPOINT).exists():
            state.restore(job.folder / CHECKPOINT)
        on_start()
        problem = MetaLoss(job.network, job.synthetic, job.augmentation, job.key.device)
        hypergradient = bilevel.Hypergradient(
            problem,
            optimizer=self.optimizer,
            steps=self.inner_steps,
            truncation=state.truncation,
            estimator=self.estimator,
            keep_every=self.keep_every,
        )
        real = RealBatches(
            job.data.train_images,
            job.data.train_labels,
            self.real_batch,
            job.augmentation,
            job.key.fold("real"),
        )
        monitor = Monitor(job.folder / "events", first_step=state.step)
        progress = Progress(self.outer_steps, self.minutes, state.step, state.seconds)
        try:
            monitor.config(config_text)
            if state.step == 0:
                self._keep(state, job)
                self._show(state, job, monitor)
            try:
                self._loop(state, job, hypergradient, real, monitor, progress, stop)
            except bilevel.NonFiniteError:
                self._save(state, job, monitor)
                raise
            self._save(state, job, monitor)
        finally:
            progress.close()
            monitor.close()
        return state

    def finished(self, state: TrainingState) -> bool:
        """Whether all that was asked for is done."""
        out_of_time = self.minutes is not None and state.seconds >= 60 * self.minutes
        return state.step >= self.outer_steps or out_of_time

    def initial_state(self, job: Job) -> TrainingState:
        """The state before the first outer step."""
        outer = job.synthetic.create(
            job.data.train_images,
            job.data.train_labels,
            job.data.num_classes,
            job.key.generator("synthetic"),
        )
        rates = {"images": self.image_lr, "labels": self.label_lr}
        optimizer = torch.optim.Adam(
            [{"params": [value], "lr": rates[name]} for name, value in outer.items()]
        )
        return TrainingState(
            outer, optimizer, copy.deepcopy(self.clip), copy.deepcopy(self.truncation)
        )

    def _loop(
        self,
        state: TrainingState,
        job: Job,
        hypergradient: bilevel.Hypergradient,
        real: RealBatches,
        monitor: Monitor,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        skipped = 0
        saved_at = time.monotonic()
        while not self.finished(state) and not stop.requested:
            before = state.seconds
            try:
                self._step(state, job, hypergradient, real, monitor, progress)
                skipped = 0
            except bilevel.NonFiniteError as error:
                skipped += 1
                if skipped == MOST_SKIPPED:
                    raise
                progress.say(f"outer step {state.step} skipped: {error}")
                state.step += 1
            for minutes in self.snapshot_minutes:
                if before < 60 * minutes <= state.seconds:
                    self._set(state, job).save(
                        job.folder / "snapshots" / f"{minutes:g}_minutes.safetensors"
                    )
            if self.validate_every and state.step % self.validate_every == 0:
                self._validate(state, job, monitor)
            if state.step % self.image_every == 0:
                self._show(state, job, monitor)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                state.save(job.folder / CHECKPOINT)
                saved_at = time.monotonic()

    def _step(
        self,
        state: TrainingState,
        job: Job,
        hypergradient: bilevel.Hypergradient,
        real: RealBatches,
        monitor: Monitor,
        progress: Progress,
    ) -> None:
        """One outer step; if it raises, the outer variables are as they were."""
        began = time.perf_counter()
        state.optimizer.zero_grad()
        images, labels = (part.split(self.real_micro_batch) for part in real.at(state.step))
        batches = bilevel.MicroBatches(
            list(zip(images, labels, strict=True)),
            [len(part) / sum(map(len, labels)) for part in labels],
        )
        result = hypergradient.backward(
            state.outer, batches, job.key.generator("outer", state.step)
        )
        bound = float("inf") if state.clip is None else state.clip([state.outer["images"]])[1]
        state.optimizer.step()
        job.synthetic.constrain_(state.outer)
        loss, accuracy = float(result.loss), float(result.metrics["accuracy"])
        state.truncation.update({"loss": loss, "accuracy": accuracy})
        seconds = time.perf_counter() - began
        state.step += 1
        state.seconds += seconds
        monitor.outer_step(state.step, result, bound, seconds)
        progress.update(state.step, state.seconds, loss, accuracy)

    def _save(self, state: TrainingState, job: Job, monitor: Monitor) -> None:
        state.save(job.folder / CHECKPOINT)
        if not self.validate_every:
            self._keep(state, job)
        self._show(state, job, monitor)

    def _validate(self, state: TrainingState, job: Job, monitor: Monitor) -> None:
        accuracy = job.evaluator.validation(
            state.outer["images"],
            job.synthetic.labels(state.outer),
            job.network,
            job.data,
            job.key.fold("validation", state.step),
        )
        if state.best_accuracy is None or accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self._keep(state, job)
        monitor.scalars(
            state.step,
            {"validation/accuracy": accuracy, "validation/best_accuracy": state.best_accuracy},
        )

    def _keep(self, state: TrainingState, job: Job) -> None:
        self._set(state, job).save(job.folder / DISTILLED)

    def _set(self, state: TrainingState, job: Job) -> DistilledSet:
        return DistilledSet(
            images=state.outer["images"].detach(),
            labels=job.synthetic.labels(state.outer).detach(),
            transform=job.data.transform,
            class_names=job.data.class_names,
            provenance={**job.provenance, "outer_step": state.step, "seconds": state.seconds},
        )

    def _show(self, state: TrainingState, job: Job, monitor: Monitor) -> None:
        pixels: Tensor = self._set(state, job).pixels()
        monitor.images(state.step, pixels, job.synthetic.images_per_class)
