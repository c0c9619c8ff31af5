"""The interface of what the outer loop minimises, and what it is given to work on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

import bilevel
from bilevel.truncation import Stage
from dd.augmentation import Augmentation
from dd.data.prepared import PreparedData
from dd.evaluation.evaluator import Evaluator
from dd.objectives.experts import Experts
from dd.runtime.run_folder import RunFolder
from dd.synthetic.dataset import SyntheticDataset

Outer = dict[str, Tensor]

#: Accuracy of the network at θ_stop on a fixed batch of the validation split.
HELD_OUT = "held_out_accuracy"
#: In the circumstances of a task: a checksum of its training data.
DATA = "data"


@final
@dataclass(frozen=True)
class Task:
    """What one distillation works on: everything but the settings of the outer loop.

    Attributes:
        data: The real images.
        network: What is trained on the synthetic set.
        augmentation: Of synthetic and real images.
        synthetic: The form of the synthetic set.
        evaluator: How the set is judged along the way.
        folder: Where the run is kept.
        key: The randomness.
        device: Where all of it is computed.
        provenance: Facts that the distilled set will carry.
        description: What experts must have in common with this, as `describe` gives it.
        circumstances: What a run that is resumed should have in common with its beginning: `DATA`,
            a checksum, must be the same; where others differ, other bits are possible.
        config: The operative configuration, of which the distilled set will carry what holds on
            any machine; empty if there is none.
    """

    data: PreparedData
    network: nn.Module
    augmentation: Augmentation
    synthetic: SyntheticDataset
    evaluator: Evaluator
    folder: RunFolder
    key: bilevel.Key
    device: torch.device
    provenance: dict[str, Any]
    description: dict[str, Any]
    circumstances: dict[str, Any] = field(default_factory=dict)
    config: str = ""


class PreparedObjective(ABC):
    """An objective at work on one task: a nested problem, and what each outer step adds to it.

    Attributes:
        problem: The nested problem.
    """

    problem: bilevel.Problem

    @abstractmethod
    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, Any]:
        """Of outer step `step`: outer variables that are not learned, and the outer batch.

        Args:
            step: From 0.
            stage: Of the truncation schedule, if it has stages.
        """

    @abstractmethod
    def report(self, result: bilevel.HypergradientResult) -> dict[str, float]:
        """Numbers to watch beside the loss and the problem's metrics."""

    def held_out_accuracy(self, params: Any) -> float:
        """The metric `HELD_OUT`, for objectives whose `metrics` have it."""
        raise NotImplementedError


class Objective(ABC):
    """What is minimised over the synthetic set, and by which outer optimizer.

    Attributes:
        learns_rate: Whether the inner learning rate is an outer variable. The inner optimizer is
            then given as a function of it, such as `@sgd`, and else made, such as `@adam()`.
        metrics: What it can tell a truncation schedule after every outer step.
    """

    learns_rate: bool = False
    metrics: Sequence[str] = ("loss", "progress")

    @property
    def experts(self) -> Experts | None:
        """The experts that it looks at, which are trained beforehand."""
        return None

    def check(
        self, network: nn.Module, image_shape: tuple[int, ...], synthetic: SyntheticDataset
    ) -> None:
        """Refuse, before anything is done, what this objective cannot work on.

        Args:
            network: What is trained on the synthetic set.
            image_shape: (C, H, W).
            synthetic: The form of the set.

        Raises:
            ValueError: Naming what does not fit.
        """

    def real_images_at_once(self, num_classes: int) -> tuple[str, int, int] | None:
        """The option for how many real images' graphs are kept, what it comes to, and that number.

        None: the outer loss looks at no real images.
        """
        return None

    def variables(self, device: torch.device) -> Outer:
        """Outer variables that are learned beside those of the synthetic set, as leaves."""
        return {}

    @abstractmethod
    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """The outer optimizer; `rates` has one for `images` and one for `labels`."""

    @abstractmethod
    def prepare(self, task: Task, key: bilevel.Key, stage: Stage | None) -> PreparedObjective:
        """What the outer loop calls, once at its start.

        Args:
            task: What to work on.
            key: The randomness of this process; that of the task is the same in all.
            stage: Of the truncation schedule at the start, if it has stages.
        """

    def provenance(self, outer: Outer) -> dict[str, float]:
        """What one has to know beside the images to train on them."""
        return {}
