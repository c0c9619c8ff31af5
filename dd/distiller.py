"""How to distil: the settings of the outer loop."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, final

import bilevel
from bilevel.clip import MovingAverageClip
from dd.checkpoint import TrainingState
from dd.checks import check_choice, check_instance, check_integer, check_number
from dd.distillation import CHECKPOINT, Distillation, Job
from dd.objectives import Objective, RealImages
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
        optimizer: The inner optimizer, a gradient transformation; or, if the objective learns its
            rate, a function that makes one.
        objective: What is minimised; default: `RealImages`.
        estimator: How they are differentiated; default: `Adjoint`.
        keep_every: Keep every k-th inner iterate and recompute the others: less memory, more time.
        keep_on: "cpu" to keep the iterates in the host's memory; default: on the device.
        real_batch: Real images in the outer loss.
        real_micro_batch: How many of them are in memory with a graph at a time.
        image_lr: The outer optimizer's rate for the images.
        label_lr: The outer optimizer's rate for learned labels.
        average_decay: Also keep an exponential moving average of the images, a ← d·a + (1 − d)·x.
            It is validated beside them, on networks of its own, and kept where it is better; the
            latest one is `snapshots/average.safetensors`. Default: none.
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
        objective: Objective | None = None,
        minutes: float | None = None,
        estimator: bilevel.estimators.Estimator | None = None,
        keep_every: int = 1,
        keep_on: str | None = None,
        real_batch: int = 5000,
        real_micro_batch: int = 1000,
        image_lr: float = 1e-3,
        label_lr: float = 1e-3,
        average_decay: float | None = None,
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
        if keep_on is not None:
            check_choice("keep_on", keep_on, ("cpu",))
        if inner_steps < truncation.minimum_steps:
            raise ValueError(
                f"inner_steps={inner_steps}: {type(truncation).__name__} needs at least "
                f"{truncation.minimum_steps}, the width of its window"
            )
        if objective is not None:
            check_instance("objective", objective, Objective, "@MatchExperts() with ()")
        self.objective = RealImages() if objective is None else objective
        is_made = hasattr(optimizer, "init") and hasattr(optimizer, "update")
        if self.objective.learns_rate and (is_made or not callable(optimizer)):
            raise ValueError(f"optimizer={optimizer!r}: its rate is learned, so write @sgd, no ()")
        if not self.objective.learns_rate and not is_made:
            raise ValueError(f"optimizer={optimizer!r}: write for example @adam() with ()")
        if average_decay is not None:
            check_number("average_decay", average_decay, above=0)
            if average_decay >= 1:
                raise ValueError(f"average_decay={average_decay}: it must be below 1")
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
        self.image_lr = image_lr
        self.label_lr = label_lr
        self.average_decay = average_decay
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

    def finished(self, state: TrainingState) -> bool:
        """Whether all that was asked for is done."""
        out_of_time = self.minutes is not None and state.seconds >= 60 * self.minutes
        return state.step >= self.outer_steps or out_of_time

    def _initial_state(self, job: Job) -> TrainingState:
        """The state before the first outer step."""
        outer = job.synthetic.create(
            job.data.train_images,
            job.data.train_labels,
            job.data.num_classes,
            job.key.generator("synthetic"),
        )
        outer |= self.objective.variables(job.device)
        rates = {"images": self.image_lr, "labels": self.label_lr}
        average = None if self.average_decay is None else outer["images"].detach().clone()
        return TrainingState(
            outer,
            self.objective.optimizer(outer, rates),
            copy.deepcopy(self.clip),
            copy.deepcopy(self.truncation),
            average,
        )
