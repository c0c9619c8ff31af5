"""Distillation by the loss of the network that the synthetic set trains (the BPTT family)."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from dd.augmentation import Augmentation
from dd.precision import Precision
from dd.problems.prototype_alignment import PrototypeAlignment
from dd.synthetic import SyntheticDataset


@final
class MetaLoss(bilevel.Problem):
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
        self.network = network
        self.synthetic = synthetic
        self.augmentation = augmentation
        self.device = device
        self.alignment = alignment
        self.precision = Precision() if precision is None else precision
        self.extractor = extractor

    def init(self, outer: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(self.network, generator, device=self.device)

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
