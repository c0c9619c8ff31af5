"""The loss on real images: the objective of the BPTT family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import torch

import bilevel
from dd.data.prepared import RealBatches
from dd.objectives.base import Goal, Objective, Outer
from dd.problems import MetaLoss

if TYPE_CHECKING:
    from dd.distillation import Job
    from dd.distiller import Distiller


@final
class RealImages(Objective):
    """Minimise the loss on real images of the network that the synthetic set trains, by Adam."""

    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [{"params": [value], "lr": rates[name]} for name, value in outer.items()]
        )

    def prepare(self, settings: Distiller, job: Job) -> Goal:
        return _LossOnRealImages(settings, job)


@final
class _LossOnRealImages(Goal):
    def __init__(self, settings: Distiller, job: Job) -> None:
        self.problem = MetaLoss(job.network, job.synthetic, job.augmentation, job.device)
        self.micro_batch = settings.real_micro_batch
        self.real = RealBatches(
            job.data.train_images,
            job.data.train_labels,
            settings.real_batch,
            job.augmentation,
            job.key.fold("real"),
        )

    def inputs(self, step: int) -> tuple[Outer, bilevel.MicroBatches]:
        images, labels = self.real.at(step)
        pieces = [part.split(self.micro_batch) for part in (images, labels)]
        weights = [len(part) / len(labels) for part in pieces[1]]
        return {}, bilevel.MicroBatches(list(zip(*pieces, strict=True)), weights)
