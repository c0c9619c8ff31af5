"""How to distil: the settings of the outer loop."""

import copy
import shutil
from collections.abc import Sequence
from typing import Any, final

import torch

import bilevel
from bilevel.clip import Clip
from bilevel.distributed import world_size
from dd.distillation.state import TrainingState
from dd.objectives import Objective, RealImages
from dd.objectives.base import Task
from dd.runtime.changes import Resumable
from dd.runtime.checks import check_choice, check_flag, check_instance, check_integer, check_number


@final
class Distiller:
    """Learn a synthetic set by gradient descent on the outer loss.

    Args:
        outer_steps: Outer steps to do.
        inner_steps: T, the length of a full inner run.
        truncation: Which inner steps are differentiated.
        optimizer: The inner optimizer, a gradient transformation; or, if the objective learns its
            rate, a function that makes one.
        objective: What is minimised; default: `RealImages`.
        minutes: Stop after this much wall clock in outer steps, if that comes first. Validation
            and evaluation are not counted.
        estimator: How they are differentiated; default: `Adjoint`.
        keep_every: Keep every k-th inner iterate and recompute the others: less memory, more time.
            Default: as many as fit in 96 MiB, or 1/64 of the GPU's memory.
        keep_on: "cpu" to keep the iterates in the host's memory; default: on the device.
        inner_replicas: Inner runs, each of a fresh network, whose hypergradients are averaged.
        compile: True to run inner steps, adjoint steps and the outer loss as compiled graphs, which
            takes about a minute at the start; False not to; "auto" to do so if the run is long
            enough to pay for it: at least 100,000 inner steps, or 10 minutes where `minutes` ends
            it, and a C++ compiler or GPU to compile for.
        tf32: Let CUDA round the inputs of float32 products and convolutions to TensorFloat-32,
            whatever the objective. Never in an evaluation.
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
        outer_steps: Resumable[int],
        inner_steps: int,
        truncation: bilevel.truncation.Truncation,
        optimizer: Any,
        objective: Objective | None = None,
        minutes: Resumable[float | None] = None,
        estimator: bilevel.estimators.Estimator | None = None,
        keep_every: int | None = None,
        keep_on: str | None = None,
        inner_replicas: int = 1,
        compile: bool | str = "auto",
        tf32: bool = False,
        image_lr: float = 1e-3,
        label_lr: float = 1e-3,
        average_decay: float | None = None,
        clip: Clip | None = None,
        validate_every: int = 0,
        image_every: Resumable[int] = 100,
        snapshot_minutes: Resumable[Sequence[float]] = (),
    ) -> None:
        for name, value, minimum in (
            ("outer_steps", outer_steps, 1),
            ("inner_steps", inner_steps, 1),
            ("keep_every", 1 if keep_every is None else keep_every, 1),
            ("inner_replicas", inner_replicas, 1),
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
        check_flag("tf32", tf32)
        if keep_on is not None:
            check_choice("keep_on", keep_on, ("cpu",))
        if inner_steps < truncation.minimum_steps:
            raise ValueError(
                f"inner_steps={inner_steps}: {type(truncation).__name__} needs at least "
                f"{truncation.minimum_steps}, the width of its window"
            )
        if objective is not None:
            check_instance("objective", objective, Objective, "@RealImages() with ()")
        self.objective = RealImages() if objective is None else objective
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
            _check_estimator(estimator)
        if clip is not None:
            check_instance("clip", clip, Clip, "@MovingAverageClip() with ()")
        if not isinstance(snapshot_minutes, (list, tuple)):
            raise ValueError(f"snapshot_minutes={snapshot_minutes!r}: it must be a list of minutes")
        for minute in snapshot_minutes:
            check_number("snapshot_minutes", minute, above=0)
        self.outer_steps = outer_steps
        self.inner_steps = inner_steps
        self.truncation = truncation
        self.optimizer = optimizer
        self.minutes = minutes
        self.estimator = estimator
        self.keep_every = keep_every
        self.keep_on = keep_on
        self.inner_replicas = inner_replicas
        self.compile = compile
        self.tf32 = tf32
        self.image_lr = image_lr
        self.label_lr = label_lr
        self.average_decay = average_decay
        self.clip = clip
        self.validate_every = validate_every
        self.image_every = image_every
        self.snapshot_minutes = sorted(snapshot_minutes)

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled; the same for a run that is resumed."""
        if self.compile != "auto":
            return bool(self.compile)
        long = self.outer_steps * self.inner_steps * self.inner_replicas >= 100_000
        if self.minutes is not None:
            long = long and self.minutes >= 10
        return long and (torch.cuda.is_available() or shutil.which("g++") is not None)

    def initial_state(self, task: Task) -> TrainingState:
        """The state before the first outer step; schedule and clip are copies of these here."""
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
            processes=world_size(),
        )

    def progress(self, state: TrainingState) -> float:
        """What is done of the run, by steps or by time, whichever is further; at least 1 is all."""
        by_time = 0.0 if self.minutes is None else state.seconds / (60 * self.minutes)
        return max(state.step / self.outer_steps, by_time)


def _check_estimator(estimator: Any) -> None:
    check_instance("estimator", estimator, bilevel.estimators.Estimator, "@Adjoint() with ()")
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
