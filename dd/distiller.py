"""How to distil: the settings of the outer loop."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, final

import torch

import bilevel
from bilevel.clip import MovingAverageClip
from dd.checkpoint import TrainingState
from dd.checks import check_choice, check_instance, check_integer, check_number
from dd.distillation import CHECKPOINT, METRICS, Distillation, Job
from dd.progress import StopRequest


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
        keep_every: Keep every k-th inner iterate and recompute the others: less memory, more time.
        keep_on: "cpu" to keep the iterates in the host's memory; default: on the device.
        real_batch: Real images in the outer loss.
        real_micro_batch: How many of them are in memory with a graph at a time.
        held_out_batch: Images of the validation split, always the same, on which θ_stop is judged
            after every outer step if the truncation schedule asks for `held_out_accuracy`.
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
        keep_on: str | None = None,
        real_batch: int = 5000,
        real_micro_batch: int = 1000,
        held_out_batch: int = 500,
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
            ("held_out_batch", held_out_batch, 1),
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
        if keep_on is not None:
            check_choice("keep_on", keep_on, ("cpu",))
        if inner_steps < truncation.minimum_steps:
            raise ValueError(
                f"inner_steps={inner_steps}: {type(truncation).__name__} needs at least "
                f"{truncation.minimum_steps}, the width of its window"
            )
        for metric in truncation.metrics:
            check_choice(f"the metric of {type(truncation).__name__}", metric, METRICS)
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
        self.keep_on = keep_on
        self.real_batch = real_batch
        self.real_micro_batch = real_micro_batch
        self.held_out_batch = held_out_batch
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

        Args:
            job: What to work on, and where.
            stop: Looked at after every outer step.
            config_text: Shown in TensorBoard.
            on_start: Called once it is sure that the run can start or go on.

        Returns:
            The state at the end. The distilled set is in the job's folder.

        Raises:
            bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient.
            DamagedFileError: The checkpoint cannot be used.
        """
        state = self._initial_state(job)
        if (job.folder / CHECKPOINT).exists():
            state.restore(job.folder / CHECKPOINT)
        on_start()
        Distillation(self, job, state).run(stop, config_text)
        return state

    def progress(self, state: TrainingState) -> float:
        """What is done of the run, by steps or by time, whichever is further; at least 1 is all."""
        by_time = 0.0 if self.minutes is None else state.seconds / (60 * self.minutes)
        return max(state.step / self.outer_steps, by_time)

    def finished(self, state: TrainingState) -> bool:
        """Whether all that was asked for is done."""
        return self.progress(state) >= 1

    def _initial_state(self, job: Job) -> TrainingState:
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
