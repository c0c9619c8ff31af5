"""No augmentation."""

from typing import final

import torch
from torch import Tensor

from dd.augmentation.base import Augmentation


@final
class NoAugmentation(Augmentation):
    """Returns the images as they are, and draws nothing."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images
