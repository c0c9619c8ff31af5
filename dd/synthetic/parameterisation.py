"""The interface of what is stored of a synthetic set's images, and how they are decoded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class Parameterisation(ABC):
    """What is stored, and learned, of the images of a synthetic set; networks see them decoded.

    Attributes:
        names: Of the tensors that are stored, which are outer variables.
        multiple: How many images each stored one is decoded to; None if that depends on the set.
        lossless: Whether any images can be stored, bit by bit, so that nothing else need be kept.
        patches_per_side: N, where every image is stored as n×n patches.
    """

    names: tuple[str, ...] = ("images",)
    multiple: int | None = 1
    lossless: bool = False
    patches_per_side: int = 1

    def __str__(self) -> str:
        """What somebody needs to know who decodes a saved set."""
        return type(self).__name__

    def per_class(
        self, images_per_class: int, num_classes: int, image_shape: tuple[int, ...], extra: int
    ) -> int:
        """How many images of each class, J, are decoded from what I plain ones take to store.

        Args:
            images_per_class: I.
            num_classes: K.
            image_shape: (C, H, W).
            extra: Further floats that are stored with every decoded image: of its learned label.

        Raises:
            ConfigurationError: Images of this shape, or so few, cannot be stored like this.
        """
        assert self.multiple is not None, "where it depends on the set, this is overridden"
        return images_per_class * self.multiple

    def layout(self, stored: Mapping[str, Tensor], images_per_class: int) -> tuple[int, int]:
        """(K, J), the number of classes and of decoded images of each, of what is stored."""
        assert self.multiple is not None, "where it depends on the set, this is overridden"
        rows = images_per_class * self.patches_per_side**2
        return len(stored["images"]) // rows, images_per_class * self.multiple

    @abstractmethod
    def encode(self, images: Tensor, num_classes: int) -> dict[str, Tensor]:
        """What is stored so that it is decoded to `images`, or as near as that can be.

        Args:
            images: Float32 [K·J, C, H, W], ordered by class.
            num_classes: K.

        Raises:
            ConfigurationError: Images of this shape cannot be stored like this.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """The images [K·J, C, H, W], or those at `index`, int64 [B]; differentiable."""

    @abstractmethod
    def project_(self, stored: Mapping[str, Tensor]) -> None:
        """Scale what is stored so that every decoded image has L2 norm 1."""

    def rates(self, image_lr: float) -> dict[str, float]:
        """The outer optimizer's rate for each stored tensor, where that for images is given."""
        return dict.fromkeys(self.names, image_lr)


def norms_of(images: Tensor) -> Tensor:
    """The L2 norm of each of [N, …], as [N]; of nothing but zeros, 1e-12."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).clamp_min(1e-12)
