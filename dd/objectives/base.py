"""The interface of what the outer loop minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

import bilevel
from bilevel.truncation import Stage
from dd.augmentation import Augmentation
from dd.data.prepared import PreparedData
from dd.evaluation.evaluator import Evaluator
from dd.synthetic.dataset import SyntheticDataset

if TYPE_CHECKING:
    from dd.distillation.settings import Distiller

Outer = dict[str, Tensor]

#: Accuracy of the network at θ_stop on a fixed batch of the validation split.
HELD_OUT = "held_out_accuracy"


@final
@dataclass(frozen=True)
class Task:
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


class PreparedObjective(ABC):
    """An objective at work on one dataset: a nested problem, and what each outer step adds to it.

    Attributes:
        problem: The nested problem.
    """

    problem: bilevel.Problem

    @abstractmethod
    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, Any]:
        """Of outer step `step`: outer variables that are given, not learned; the outer batch.

        Args:
            step: From 0.
            stage: Of the truncation schedule, if it has stages.
        """

    def held_out_accuracy(self, params: Any) -> float:
        """The metric `HELD_OUT`, for objectives whose `metrics` have it."""
        raise NotImplementedError

    def report(self, result: bilevel.HypergradientResult) -> dict[str, float]:
        """Numbers to watch beside the loss and the problem's metrics."""
        return {}


class Objective(ABC):
    """What is minimised over the synthetic set, and by which outer optimizer.

    Attributes:
        learns_rate: Whether the inner learning rate is an outer variable. The inner optimizer is
            then given as a function of it, such as `@sgd`, and else made, such as `@adam()`.
        metrics: What it can tell a truncation schedule after every outer step.
        own_settings: Settings of `Distiller` that not every objective uses, but this one does.
    """

    learns_rate: bool = False
    metrics: Sequence[str] = ("loss", "progress")
    own_settings: Sequence[str] = ()

    def variables(self, device: torch.device) -> Outer:
        """Outer variables that are learned beside those of the synthetic set, as leaves."""
        return {}

    @abstractmethod
    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """The outer optimizer; `rates` has one for `images` and one for `labels`."""

    @abstractmethod
    def prepare(self, settings: Distiller, task: Task, key: bilevel.Key) -> PreparedObjective:
        """What the outer loop calls, once at its start, with the randomness of this process."""

    def provenance(self, outer: Outer) -> dict[str, float]:
        """What one has to know beside the images to train on them."""
        return {}
