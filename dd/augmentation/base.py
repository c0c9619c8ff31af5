"""The interface of every augmentation."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Augmentation(ABC):
    """A random, differentiable map of a batch of images to a batch of the same shape.

    An augmentation is part of the inner batch B(φ, t): it is differentiated once, with respect to
    the images, and re-run whenever a step is re-run. It therefore holds no state and draws from
    the given generator alone: the same generator state gives the same bits.
    """

    @abstractmethod
    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: Floating point, [N, C, H, W]; never written to.
            generator: The only source of randomness. It may live on another device than
                `images`; what is drawn is then moved there.

        Returns:
            [N, C, H, W], of the dtype and on the device of `images`. Its first derivative with
            respect to `images` is exact; a second derivative need not exist.

        Raises:
            ValueError: `images` is not a floating-point tensor with four dimensions.
        """
