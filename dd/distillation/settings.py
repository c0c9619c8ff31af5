"""How to distil: the settings of the outer loop."""

import copy
import shutil
from collections.abc import Callable, Sequence
from typing import Any, final

import torch

import bilevel
from bilevel import distributed
from bilevel.clip import Clip
from dd.distillation.loop import CHECKPOINT, Distillation
from dd.distillation.state import TrainingState
from dd.objectives import Objective, RealImages
from dd.objectives.alignment import PrototypeAlignment
from dd.objectives.base import Task
from dd.runtime.checks import check_choice, check_instance, check_integer, check_number
from dd.runtime.precision import Precision
from dd.runtime.stopping import StopRequest


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
            Default: as many as fit in 96 MiB, or 1/64 of the GPU's memory.
        keep_on: "cpu" to keep the iterates in the host's memory; default: on the device.
        inner_replicas: Inner runs, each of a fresh network, whose hypergradients are averaged.
        compile: True to run inner steps, adjoint steps and the outer loss as compiled graphs, which
            takes about a minute at the start; False not to; "auto" to do so if the run is long
            enough to pay for it: at least 100,000 inner steps, or 10 minutes where `minutes` ends
            it, and a C++ compiler or GPU to compile for.
        precision: Arithmetic of the networks; default: float32.
        real_batch: Real images in the outer loss; of several processes each has as many.
        real_micro_batch: How many of them are in memory with a graph at a time.
        held_out_batch: Images of the validation split, always the same, on which θ_stop is judged
            after every outer step if the truncation schedule asks for `held_out_accuracy`.
        image_lr: The outer optimizer's rate for the images.
        label_lr: The outer optimizer's rate for learned labels.
        alignment: A term of the outer loss beside the cross-entropy; default: none.
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
        keep_every: int | None = None,
        keep_on: str | None = None,
        inner_replicas: int = 1,
        compile: bool | str = "auto",
        precision: Precision | None = None,
        real_batch: int = 5000,
        real_micro_batch: int = 1000,
        held_out_batch: int = 500,
        image_lr: float = 1e-3,
        label_lr: float = 1e-3,
        alignment: PrototypeAlignment | None = None,
        average_decay: float | None = None,
        clip: Clip | None = None,
        validate_every: int = 0,
        image_every: int = 100,
        snapshot_minutes: Sequence[float] = (),
    ) -> None:
        for name, value, minimum in (
            ("outer_steps", outer_steps, 1),
            ("inner_steps", inner_steps, 1),
            ("keep_every", 1 if keep_every is None else keep_every, 1),
            ("inner_replicas", inner_replicas, 1),
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
        check_choice("compile", compile, (True, False, "auto"))
        if precision is not None:
            check_instance("precision", precision, Precision, "@Precision() with ()")
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
        # Of a precision, TensorFloat-32 is everybody's.
        networks = precision is not None and not precision.is_for_any_network
        for name, given in (("alignment", alignment is not None), ("precision", networks)):
            if given and name not in self.objective.own_settings:
                raise ValueError(
                    f"{name}: {type(self.objective).__name__} makes no use of it; leave it out"
                )
        for metric in truncation.metrics:
            check_choice(
                f"the metric of {type(truncation).__name__}", metric, self.objective.metrics
            )
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
        basis = getattr(estimator, "basis", None)
        if isinstance(basis, bilevel.basis.Eigenvectors) and basis.refresh_every > 1:
            raise ValueError(
                f"Eigenvectors.refresh_every={basis.refresh_every}: it must be 1, since every "
                "outer step trains a fresh network, to which older eigenvectors do not belong"
            )
        persistent = isinstance(estimator, bilevel.estimators.PersistentEvolutionStrategies)
        if persistent or getattr(estimator, "warm_start", False):
            raise ValueError(
                f"estimator={type(estimator).__name__}: it goes on from what the outer step before "
                "left, but every outer step trains a fresh network"
            )
        if alignment is not None:
            check_instance(
                "alignment", alignment, PrototypeAlignment, "@PrototypeAlignment() with ()"
            )
        if clip is not None:
            check_instance("clip", clip, Clip, "@MovingAverageClip() with ()")
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
        self.inner_replicas = inner_replicas
        self.compile = compile
        self.precision = Precision() if precision is None else precision
        self.real_batch = real_batch
        self.real_micro_batch = real_micro_batch
        self.held_out_batch = held_out_batch
        self.image_lr = image_lr
        self.label_lr = label_lr
        self.alignment = alignment
        self.average_decay = average_decay
        self.clip = clip
        self.validate_every = validate_every
        self.image_every = image_every
        self.snapshot_minutes = sorted(snapshot_minutes)

    def distil(
        self, task: Task, stop: StopRequest, config_text: str, on_start: Callable[[], None]
    ) -> TrainingState:
        """Run, or go on from the checkpoint in `task.folder`, until done or asked to stop.

        Args:
            task: What to work on, and where.
            stop: Looked at after every outer step, in every process.
            config_text: Shown in TensorBoard.
            on_start: Called once it is sure that the run can start or go on.

        Returns:
            The state at the end. The distilled set is in the task's folder.

        Raises:
            bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient.
            bilevel.ProcessError: Another process failed, or cannot read the checkpoint.
            DamagedFileError: The checkpoint cannot be used.
        """
        state = self._initial_state(task)
        if (task.folder / CHECKPOINT).exists():
            state.restore(task.folder / CHECKPOINT)
        steps = distributed.gather(state.step)
        if len(set(steps)) > 1:
            raise bilevel.ProcessError(
                f"the processes would go on from outer steps {steps}: {task.folder} must be a "
                "folder that all of them can read"
            )
        distributed.broadcast_(state.outer.values())
        distillation = Distillation(self, task, state)
        on_start()
        distillation.run(stop, config_text)
        return state

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled; the same for a run that is resumed."""
        if self.compile != "auto":
            return bool(self.compile)
        long = self.outer_steps * self.inner_steps * self.inner_replicas >= 100_000
        if self.minutes is not None:
            long = long and self.minutes >= 10
        return long and (torch.cuda.is_available() or shutil.which("g++") is not None)

    def progress(self, state: TrainingState) -> float:
        """What is done of the run, by steps or by time, whichever is further; at least 1 is all."""
        by_time = 0.0 if self.minutes is None else state.seconds / (60 * self.minutes)
        return max(state.step / self.outer_steps, by_time)

    def finished(self, state: TrainingState) -> bool:
        """Whether all that was asked for is done."""
        return self.progress(state) >= 1

    def _initial_state(self, task: Task) -> TrainingState:
        """The state before the first outer step."""
        outer = task.synthetic.create(
            task.data.train_images,
            task.data.train_labels,
            task.data.num_classes,
            task.key.generator("synthetic"),
        )
        outer |= self.objective.variables(task.device)
        rates = {"images": self.image_lr, "labels": self.label_lr}
        average = None if self.average_decay is None else outer["images"].detach().clone()
        return TrainingState(
            outer,
            self.objective.optimizer(outer, rates),
            copy.deepcopy(self.clip),
            copy.deepcopy(self.truncation),
            average,
            processes=distributed.world_size(),
        )
