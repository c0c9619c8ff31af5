"""The augmentation of RaT-BPTT and AT-BPTT."""

from typing import final

import torch
from torch import Tensor

from dd.augmentation import families
from dd.augmentation.base import Augmentation


@final
class FlipOrRotate(Augmentation):
    """Either flips or rotates; which of the two is drawn once for the batch, evenly.

    A flip mirrors each image with probability 1/2; a rotation turns each image by its own angle,
    uniform in ±15°. Source: Feng et al., "Embarrassingly Simple Dataset Distillation", ICLR 2024
    (arXiv 2311.07025), and its code.
    """

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if torch.randint(2, (), device=generator.device, generator=generator).item() == 0:
            return families.flip(images, generator, probability=0.5)
        return families.rotate(images, generator, degrees=15.0)
