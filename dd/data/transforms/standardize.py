"""Standardisation per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from dd.data.transforms.base import PixelTransform, as_float32, as_pixels
from dd.data.transforms.moments import pixel_chunks

_CONSTANT = 1e-8


@final
class Standardize(PixelTransform):
    """(x − mean) / std, per channel.

    The field's figures for CIFAR-10 are mean (0.4914, 0.4822, 0.4465) and
    std (0.2023, 0.1994, 0.2010), where std is the average over images of each image's own; fitting
    gives the standard deviation over all pixels, which is about 0.25.

    Args:
        mean: C values.
        std: C values above 0.

    Raises:
        ValueError: The two differ in length, are empty, or a value of `std` is not positive.
    """

    kind: ClassVar[str] = "standardize"
    elementwise: ClassVar[bool] = True
    formula: ClassVar[str] = "y = (x - mean[:, None, None]) / std[:, None, None]"
    inverse_formula: ClassVar[str] = "x = y * std[:, None, None] + mean[:, None, None]"
    tensors: ClassVar[Mapping[str, str]] = {"mean": "C", "std": "C"}

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float32).detach().clone()
        self.std = torch.as_tensor(std, dtype=torch.float32).detach().clone()
        if self.mean.dim() != 1 or self.mean.shape != self.std.shape or len(self.mean) == 0:
            raise ValueError(
                f"mean has shape {tuple(self.mean.shape)} and std {tuple(self.std.shape)}; "
                "each must have one value per channel"
            )
        if not bool((self.std > 0).all()):
            raise ValueError(f"std is {self.std.tolist()}; every value must be positive")

    @classmethod
    @torch.no_grad()
    def fit(cls, images: Tensor, *, chunk: int = 1000) -> Self:
        """Mean and standard deviation of each channel over all images and positions.

        A constant channel gets std 1, so that it becomes 0 instead of noise.

        Args:
            images: The training images [N, C, H, W], uint8, or floating point in [0, 1].
            chunk: Images per step; only memory and time depend on it.

        Raises:
            ValueError: The images or `chunk` are not allowed.
        """
        total = sum(part.sum((0, 2, 3)) for part in pixel_chunks(images, chunk))
        count = images.numel() // images.shape[1]
        mean = torch.as_tensor(total) / count
        squares = sum(
            (part - mean[:, None, None]).square_().sum((0, 2, 3))
            for part in pixel_chunks(images, chunk)
        )
        std = (torch.as_tensor(squares) / count).sqrt_()
        return cls(mean, torch.where(std > _CONSTANT, std, 1.0))

    def __call__(self, images: Tensor) -> Tensor:
        """See `PixelTransform.__call__`; any height and width."""
        pixels = as_pixels(images, tuple(self.mean.shape))
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, transformed: Tensor) -> Tensor:
        """The exact inverse, x·std + mean; see `PixelTransform.inverse`."""
        values = as_float32("transformed", transformed, tuple(self.mean.shape))
        return values * self.std[:, None, None] + self.mean[:, None, None]
