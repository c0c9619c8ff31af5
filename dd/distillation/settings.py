"""How to distil: the settings of the outer loop."""

import copy
import shutil
from collections.abc import Sequence
from typing import Any, final

import torch

import bilevel
from bilevel.checks import check_choice, check_flag, check_instance, check_integer, check_number
from bilevel.clip import Clip
from bilevel.distributed import world_size
from dd.distillation.state import TrainingState
from dd.objectives import Objective, RealImages
from dd.objectives.base import Task
from dd.runtime.changes import Resumable


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
        average_decay: Also keep an exponential moving average of the images, a ← d·a + (1 − d)·x,
            or of what is stored of them.
            It is validated beside them, on networks of its own, and kept where it is better; the
            latest one is `snapshots/average.safetensors`. Default: none.
        clip: Clipping of the images' hypergradient; default: none.
        validate_every: Outer steps between looks at the validation accuracy; the best set seen is
            the one that is kept. 0: no looks, the last set is kept.
        image_every: Outer steps between pictures in TensorBoard.
        nearest_real: In pictures, show beside every image the nearest training image of its class
            (`dd.distillation.prototypes`), which takes a while where images are many and large.
        snapshot_minutes: Wall-clock times at which the set is also kept under `snapshots/`.
        checkpoint_seconds: Wall clock between two checkpoints. 0: one after every outer step.
        back_off: How often a run that diverges (ten outer steps in a row have no finite
            hypergradient, or one makes the set non-finite) goes back to its last checkpoint and
            goes on with half the outer learning rates. 0: it ends, and the checkpoint stays.
        patience_seconds: Of several processes, for how long one may not be heard of, or be late in
            an outer step, until the others give it up, save and end; at least 10.

    Raises:
        ConfigurationError: An argument outside its range.
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
        image_lr: Resumable[float] = 1e-3,
        label_lr: Resumable[float] = 1e-3,
        average_decay: float | None = None,
        clip: Clip | None = None,
        validate_every: int = 0,
        image_every: Resumable[int] = 100,
        nearest_real: Resumable[bool] = False,
        snapshot_minutes: Resumable[Sequence[float]] = (),
        checkpoint_seconds: Resumable[float] = 60.0,
        back_off: Resumable[int] = 0,
        patience_seconds: Resumable[float] = 120.0,
    ) -> None:
        self.outer_steps = check_integer("outer_steps", outer_steps)
        self.inner_steps = check_integer("inner_steps", inner_steps)
        self.truncation = check_instance(
            "truncation", truncation, bilevel.truncation.Truncation, "@RandomWindow() with ()"
        )
        if inner_steps < truncation.minimum_steps:
            raise bilevel.ConfigurationError(
                f"inner_steps={inner_steps}: {type(truncation).__name__} needs at least "
                f"{truncation.minimum_steps}, the width of its window"
            )
        self.objective = RealImages() if objective is None else objective
        check_instance("objective", self.objective, Objective, "@RealImages() with ()")
        for metric in truncation.metrics:
            check_choice(
                f"the metric of {type(truncation).__name__}", metric, self.objective.metrics
            )
        self.optimizer = _checked_optimizer(optimizer, self.objective)
        self.minutes = None if minutes is None else check_number("minutes", minutes, above=0)
        self.estimator = None if estimator is None else _checked_estimator(estimator)
        self.keep_every = None if keep_every is None else check_integer("keep_every", keep_every)
        self.keep_on = check_choice("keep_on", keep_on, (None, "cpu"))
        self.inner_replicas = check_integer("inner_replicas", inner_replicas)
        self.compile = check_choice("compile", compile, (True, False, "auto"))
        self.tf32 = check_flag("tf32", tf32)
        self.image_lr = check_number("image_lr", image_lr, above=0)
        self.label_lr = check_number("label_lr", label_lr, above=0)
        self.average_decay = average_decay
        if average_decay is not None:
            check_number("average_decay", average_decay, above=0, below=1)
        self.clip = clip
        if clip is not None:
            check_instance("clip", clip, Clip, "@MovingAverageClip() with ()")
        self.validate_every = check_integer("validate_every", validate_every, 0)
        self.image_every = check_integer("image_every", image_every)
        self.nearest_real = check_flag("nearest_real", nearest_real)
        if not isinstance(snapshot_minutes, (list, tuple)):
            raise bilevel.ConfigurationError(
                f"snapshot_minutes={snapshot_minutes!r}: it must be a list of minutes"
            )
        self.snapshot_minutes = sorted(
            check_number("snapshot_minutes", minute, above=0) for minute in snapshot_minutes
        )
        self.checkpoint_seconds = check_number("checkpoint_seconds", checkpoint_seconds, minimum=0)
        self.back_off = check_integer("back_off", back_off, 0, 50)
        self.patience_seconds = check_number("patience_seconds", patience_seconds, minimum=10)

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
        rates = task.synthetic.parameterisation.rates(self.image_lr) | {"labels": self.label_lr}
        average = None
        if self.average_decay is not None:
            stored = task.synthetic.stored(outer)
            average = {name: value.detach().clone() for name, value in stored.items()}
        return TrainingState(
            outer,
            self.objective.optimizer(outer, rates),
            copy.deepcopy(self.clip),
            copy.deepcopy(self.truncation),
            average,
            processes=world_size(),
        )


def _checked_optimizer(optimizer: Any, objective: Objective) -> Any:
    is_made = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if objective.learns_rate and (is_made or not callable(optimizer)):
        raise bilevel.ConfigurationError(
            f"optimizer={optimizer!r}: its rate is learned, so write @sgd, no ()"
        )
    if not objective.learns_rate and not is_made:
        raise bilevel.ConfigurationError(
            f"optimizer={optimizer!r}: write for example @adam() with ()"
        )
    return optimizer


def _checked_estimator(estimator: bilevel.estimators.Estimator) -> bilevel.estimators.Estimator:
    check_instance("estimator", estimator, bilevel.estimators.Estimator, "@Adjoint() with ()")
    if estimator.carries_over:
        raise bilevel.ConfigurationError(
            f"estimator={type(estimator).__name__}: it takes over {estimator.carries_over} from "
            "the outer step before, but every outer step trains a fresh network"
        )
    return estimator
