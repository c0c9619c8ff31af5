"""The loss on real images: the objective of the BPTT family."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from bilevel.checks import check_instance, check_integer
from bilevel.truncation import Stage
from dd.augmentation import Augmentation
from dd.data.prepared import RealBatches
from dd.networks import named_parameters_of
from dd.objectives.alignment import PrototypeAlignment
from dd.objectives.base import HELD_OUT, Objective, Outer, PreparedObjective, Task
from dd.objectives.difficulty import DifficultyPacing, Pool
from dd.objectives.experts import Experts
from dd.objectives.fresh_network import FreshNetwork
from dd.runtime.precision import Precision
from dd.synthetic.dataset import SyntheticDataset


@final
class RealImages(Objective):
    """Minimise the loss on real images of the network that the synthetic set trains, by Adam.

    Args:
        real_batch: Real images in the outer loss; of several processes each has as many.
        real_micro_batch: How many of them are in memory with a graph at a time.
        held_out_batch: Images of the validation split, always the same, on which θ_stop is judged
            after every outer step if the truncation schedule asks for `held_out_accuracy`.
        alignment: A term of the outer loss beside the cross-entropy; default: none.
        precision: Arithmetic of the networks; default: float32.
        pacing: Which real images an outer step may draw; default: all of them.

    Raises:
        ValueError: An argument outside its range.
        ConfigurationError: From `prepare`, if the pacing leaves fewer images than a batch has, or
            follows stages and the truncation schedule has none.
        DamagedFileError, FileNotFoundError: From `prepare`, if an alignment takes the features of
            experts, and they are damaged, others or not there.
    """

    metrics = ("loss", "accuracy", HELD_OUT, "progress")

    def __init__(
        self,
        real_batch: int = 5000,
        real_micro_batch: int = 1000,
        held_out_batch: int = 500,
        alignment: PrototypeAlignment | None = None,
        precision: Precision | None = None,
        pacing: DifficultyPacing | None = None,
    ) -> None:
        self.real_batch = check_integer("real_batch", real_batch)
        self.real_micro_batch = check_integer("real_micro_batch", real_micro_batch)
        self.held_out_batch = check_integer("held_out_batch", held_out_batch)
        if alignment is not None:
            check_instance(
                "alignment", alignment, PrototypeAlignment, "@PrototypeAlignment() with ()"
            )
        if pacing is not None:
            check_instance("pacing", pacing, DifficultyPacing, "@DifficultyPacing() with ()")
        self.alignment = alignment
        self.precision = Precision() if precision is None else precision
        check_instance("precision", self.precision, Precision, "@Precision() with ()")
        self.pacing = pacing

    @property
    def experts(self) -> Experts | None:
        return None if self.alignment is None else self.alignment.experts

    def check(
        self, network: nn.Module, image_shape: tuple[int, ...], synthetic: SyntheticDataset
    ) -> None:
        if self.alignment is not None:
            self.alignment.check(network, image_shape, synthetic.patches_per_side)

    def real_images_at_once(self, num_classes: int) -> tuple[str, int, int]:
        images = min(self.real_micro_batch, self.real_batch)
        return "RealImages.real_micro_batch", images, images

    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [{"params": [value], "lr": rates[name]} for name, value in outer.items()]
        )

    def prepare(self, task: Task, key: bilevel.Key, stage: Stage | None) -> PreparedObjective:
        return _LossOnRealImages(self, task, key, stage)


@final
class _LossOnRealImages(PreparedObjective):
    def __init__(
        self, settings: RealImages, task: Task, key: bilevel.Key, stage: Stage | None
    ) -> None:
        self.settings, self.data, self.augmentation = settings, task.data, task.augmentation
        settings.precision.warn_if_imitated(task.device)
        self.pool: Pool | None = None
        if settings.pacing is not None:
            self.pool = settings.pacing.pool_for(task, settings.real_batch, stage)
        self.problem = self._meta_loss = MetaLoss(
            task.network,
            task.synthetic,
            task.augmentation,
            task.device,
            settings.alignment,
            settings.precision,
            _extractor(settings, task),
        )
        self.key, self.alignment_key = key.fold("real"), key.fold("aligned")
        self.stage, self.real = stage, self._batches(stage)
        # Drawn, as a dataset may be ordered by class; fixed, so that a gain is not one of the draw.
        self.held_out = torch.randperm(
            len(task.data.validation_labels), generator=task.key.generator("held_out")
        )[: settings.held_out_batch].to(task.device)

    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, bilevel.MicroBatches]:
        if stage != self.stage:
            self.stage, self.real = stage, self._batches(stage)
        images, labels = self.real.at(step)
        pieces = [part.split(self.settings.real_micro_batch) for part in (images, labels)]
        weights = [len(part) / len(labels) for part in pieces[1]]
        alignment = self.settings.alignment
        if alignment is not None and alignment.classes_per_step is not None:
            generator = self.alignment_key.generator(step)
            aligned = torch.randperm(self.data.num_classes, generator=generator)
            aligned = aligned[: alignment.classes_per_step].to(labels.device)
            pieces.append((aligned,) * len(weights))
        return {}, bilevel.MicroBatches(list(zip(*pieces, strict=True)), weights)

    def report(self, result: bilevel.HypergradientResult) -> dict[str, float]:
        return {}

    def _batches(self, stage: Stage | None) -> RealBatches:
        """Made anew for every stage, as what is read ahead comes from the pool of the last one."""
        pool = self.pool
        return RealBatches(
            self.data.train_images,
            self.data.train_labels,
            self.settings.real_batch,
            self.augmentation,
            self.key,
            None if pool is None else lambda step: pool(step, stage),
        )

    @torch.no_grad()
    def held_out_accuracy(self, params: Any) -> float:
        images = self.data.validation_images[self.held_out]
        labels = self.data.validation_labels[self.held_out]
        parts = images.split(self.settings.real_micro_batch)
        predicted = torch.cat([self._meta_loss.predictions(params, part) for part in parts])
        return float((predicted == labels).float().mean())


def _extractor(settings: RealImages, task: Task) -> dict[str, Tensor] | None:
    """The parameters of the expert whose features are aligned, if it is not the inner network's."""
    if settings.alignment is None or settings.alignment.experts is None:
        return None
    experts = settings.alignment.experts.open(task.description)
    return named_parameters_of(task.network, experts.snapshot(0, experts.snapshots).to(task.device))


@final
class MetaLoss(FreshNetwork):
    """Train a fresh network on the synthetic set; judge it by its loss on real images.

        ℓ(θ, (x, y)) = cross-entropy of the network on augmented synthetic images x, labels y
        F(θ, φ)      = cross-entropy on a batch of (already augmented) real images, + alignment

    Outer variables are those of `SyntheticDataset`; the outer batch is (images, labels), and may
    have the classes to align, int64 [k], as a third part. Reports `accuracy` on the outer batch, a
    fraction, and with an alignment `cross_entropy` and its parts.

    Args:
        network: The module whose parameters are trained; only its structure is used.
        synthetic: How inner batches are drawn.
        augmentation: Applied to every inner batch.
        device: Where parameters live.
        alignment: A term that draws the synthetic images' features to those of the real ones.
        precision: Of the networks' arithmetic; default: float32.
        extractor: Parameters of the network whose features are aligned; default: θ_stop.

    Source: the outer objective of Feng et al., arXiv 2311.07025, equation 1.
    """

    def __init__(
        self,
        network: nn.Module,
        synthetic: SyntheticDataset,
        augmentation: Augmentation,
        device: torch.device,
        alignment: PrototypeAlignment | None = None,
        precision: Precision | None = None,
        extractor: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(network, synthetic, augmentation, device)
        self.alignment = alignment
        self.precision = Precision() if precision is None else precision
        check_instance("precision", self.precision, Precision, "@Precision() with ()")
        self.extractor = extractor

    def inner_batch(
        self, outer: Any, step: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        images, labels = self.synthetic.batch(outer, generator)
        return self.augmentation(images, generator), labels

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self._logits(params, images, self.precision.inner), labels)

    def outer_loss(self, params: Any, outer: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels, *aligned = batch
        logits = self._logits(params, images, self.precision.outer)
        loss = F.cross_entropy(logits, labels)
        metrics = {"accuracy": (logits.argmax(dim=1) == labels).float().mean()}
        if self.alignment is None:
            return loss, metrics
        num_classes = logits.shape[1]
        classes = aligned[0] if aligned else torch.arange(num_classes, device=labels.device)
        alignment, parts = self.alignment(
            self.network,
            params if self.extractor is None else self.extractor,
            (images, labels),
            self.synthetic.of_classes(outer, classes),
            classes,
            num_classes,
            self.synthetic.patches_per_side,
        )
        return loss + alignment, {**metrics, "cross_entropy": loss, **parts}

    def predictions(self, params: Any, images: Tensor) -> Tensor:
        """The class that the network finds likeliest for each image: int64 [N]."""
        return self._logits(params, images, self.precision.outer).argmax(dim=1)

    def _logits(self, params: Any, images: Tensor, dtype: str) -> Tensor:
        """Logits [N, classes], float32 whatever `dtype` the network runs in."""
        with self.precision.autocast(dtype, images.device):
            logits: Tensor = functional_call(self.network, params, (self.precision.stored(images),))
        return logits.to(images.dtype)
