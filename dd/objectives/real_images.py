"""The loss on real images: the objective of the BPTT family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

import bilevel
from bilevel.distributed import broadcast_, rank
from bilevel.truncation import Stage
from dd.checks import check_instance
from dd.data.difficulty import DifficultyPacing
from dd.data.prepared import RealBatches
from dd.expert_buffer import check_description
from dd.files import DamagedFileError, read_tensors, write_tensors
from dd.networks import named_parameters_of
from dd.objectives.base import HELD_OUT, Goal, Objective, Outer
from dd.problems import MetaLoss

if TYPE_CHECKING:
    from dd.distiller import Distiller
    from dd.job import Job

#: From an outer step and its stage to the indices of the images it may draw.
Pool = Callable[[int, Stage | None], Tensor]
#: Where in a run's folder the difficulty of every training image is.
SCORES = "difficulty.safetensors"


@final
class RealImages(Objective):
    """Minimise the loss on real images of the network that the synthetic set trains, by Adam.

    Args:
        pacing: Which real images an outer step may draw; default: all of them.

    Raises:
        ConfigurationError: From `prepare`, if the pacing leaves fewer images than a batch has, or
            follows stages and the truncation schedule has none.
        DamagedFileError, FileNotFoundError: From `prepare`, if an alignment takes the features of
            experts, and they are damaged, others or not there.
    """

    metrics = ("loss", "accuracy", HELD_OUT, "progress")
    own_settings = ("alignment", "precision")

    def __init__(self, pacing: DifficultyPacing | None = None) -> None:
        if pacing is not None:
            check_instance("pacing", pacing, DifficultyPacing, "@DifficultyPacing() with ()")
        self.pacing = pacing

    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [{"params": [value], "lr": rates[name]} for name, value in outer.items()]
        )

    def prepare(self, settings: Distiller, job: Job, key: bilevel.Key) -> Goal:
        return _LossOnRealImages(settings, job, key, self._pool(settings, job))

    def _pool(self, settings: Distiller, job: Job) -> Pool | None:
        if self.pacing is None:
            return None
        self.pacing.share(0, settings.truncation.stage)  # raises what cannot be at the start
        images, labels = job.data.train_images, job.data.train_labels
        smallest = int(self.pacing.start * len(labels))
        if smallest < settings.real_batch:
            raise bilevel.ConfigurationError(
                f"DifficultyPacing.start={self.pacing.start}: a share of {smallest} images is less "
                f"than a batch, real_batch={settings.real_batch}"
            )
        # Where training is not repeatable, all processes, and a resumed run, still draw from the
        # same images: those of the first scores that process 0 computed.
        path = job.folder / SCORES
        scored = {**job.description, "scoring": self.pacing.scoring}
        if path.exists():
            tensors, metadata = read_tensors(path)
            scores = tensors.get("scores", labels[:0]).to(labels.device)
            try:
                check_description(path, metadata, scored, "scores")
            except DamagedFileError as error:
                raise DamagedFileError(f"{path} does not fit, delete it: {error}") from error
            if scores.shape != labels.shape:
                raise DamagedFileError(
                    f"{path} has {len(scores)} scores for {len(labels)} training images"
                )
        else:
            scores = self.pacing.scores(
                job.network, images, labels, job.augmentation, job.key.fold("difficulty")
            )
            broadcast_([scores])
            if rank() == 0:
                write_tensors(path, {"scores": scores}, scored)
        return self.pacing.pool(scores, labels)


@final
class _LossOnRealImages(Goal):
    def __init__(
        self,
        settings: Distiller,
        job: Job,
        key: bilevel.Key,
        pool: Pool | None,
    ) -> None:
        self.problem = self._meta_loss = MetaLoss(
            job.network,
            job.synthetic,
            job.augmentation,
            job.device,
            settings.alignment,
            settings.precision,
            _extractor(settings, job),
        )
        self.alignment, self.num_classes = settings.alignment, job.data.num_classes
        self.alignment_key = key.fold("aligned")
        self.micro_batch = settings.real_micro_batch
        self.data = job.data
        self.augmentation = job.augmentation
        self.real_batch, self.pool, self.key = settings.real_batch, pool, key.fold("real")
        self.stage = settings.truncation.stage
        self.real = self._batches(self.stage)
        # Drawn, as a dataset may be ordered by class; fixed, so that a gain is not one of the draw.
        self.held_out = torch.randperm(
            len(job.data.validation_labels), generator=job.key.generator("held_out")
        )[: settings.held_out_batch].to(job.device)

    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, bilevel.MicroBatches]:
        if stage != self.stage:
            self.stage, self.real = stage, self._batches(stage)
        images, labels = self.real.at(step)
        pieces = [part.split(self.micro_batch) for part in (images, labels)]
        weights = [len(part) / len(labels) for part in pieces[1]]
        if self.alignment is not None and self.alignment.classes_per_step is not None:
            generator = self.alignment_key.generator(step)
            aligned = torch.randperm(self.num_classes, generator=generator)
            aligned = aligned[: self.alignment.classes_per_step].to(labels.device)
            pieces.append((aligned,) * len(weights))
        return {}, bilevel.MicroBatches(list(zip(*pieces, strict=True)), weights)

    def _batches(self, stage: Stage | None) -> RealBatches:
        """Made anew for every stage, as what is read ahead comes from the pool of the last one."""
        pool = self.pool
        return RealBatches(
            self.data.train_images,
            self.data.train_labels,
            self.real_batch,
            self.augmentation,
            self.key,
            None if pool is None else lambda step: pool(step, stage),
        )

    @torch.no_grad()
    def held_out_accuracy(self, params: Any) -> float:
        images = self.data.validation_images[self.held_out]
        labels = self.data.validation_labels[self.held_out]
        predicted = torch.cat(
            [self._meta_loss.predictions(params, part) for part in images.split(self.micro_batch)]
        )
        return float((predicted == labels).float().mean())


def _extractor(settings: Distiller, job: Job) -> dict[str, Tensor] | None:
    """The parameters of the expert whose features are aligned, if it is not the inner network's."""
    if settings.alignment is None or settings.alignment.experts is None:
        return None
    experts = settings.alignment.experts.open(job.description)
    return named_parameters_of(job.network, experts.snapshot(0, experts.snapshots).to(job.device))
