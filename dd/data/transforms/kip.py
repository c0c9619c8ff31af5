"""The whitening of KIP, as RaT-BPTT and AT-BPTT use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bilevel.checks import check_number
from dd.data.transforms.base import PixelTransform, as_float32, as_pixels
from dd.data.transforms.declared import IMAGE_SHAPE
from dd.data.transforms.moments import (
    MAX_DIMENSION,
    check_dimension,
    eigendecomposition,
    pixel_chunks,
    second_moment,
)

# One pixel that differs by 1/255 in an otherwise constant image gives a norm of about 4e-3.
_NORM_FLOOR = 1e-4


@final
@dataclass(eq=False, repr=False)
class KIPWhitening(PixelTransform):
    """V diag(λ + r)^(−1/2) Vᵀ z, where z is the image with mean 0 and norm 1.

    Each image's own mean over all its pixels and channels is removed, and the rest is divided by
    √(‖·‖² + 1e-8), its L2 norm: the small term only matters for a constant image, which becomes 0
    instead of NaN. V diag(λ) Vᵀ = C = Σ z zᵀ / N is the uncentred second moment of the normalised
    training images, and r = regularization · tr(C) / d.

    The normalisation forgets every image's mean and norm, so `inverse` cannot be exact: it
    undoes the matrix exactly, then gives every image the average norm and mean of the training
    images. That is made for people to look at.

    Source: Nguyen et al., "Dataset distillation with infinitely wide convolutional networks"
    (arXiv 2107.13034), in the form of RaT-BPTT's released code (arXiv 2311.07025), which does not
    standardise the channels first. Use `fit`; the constructor takes tensors that were fitted.

    Args:
        image_shape: (C, H, W), int64 [3].
        mean_pixel: Average over training images of their own mean, float32 [].
        mean_norm: Average over training images of their norm after that, float32 [].
        eigenvectors: V, float32 [d, d] with d = C·H·W, one in each column.
        eigenvalues: λ, float32 [d].
        ridge: R, float32 [].
    """

    kind: ClassVar[str] = "kip"
    elementwise: ClassVar[bool] = False
    formula: ClassVar[str] = (
        "z = x - x.mean((1, 2, 3), keepdim=True)\n"
        "z = z / (z.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()\n"
        "W = (eigenvectors * (eigenvalues + ridge).rsqrt()) @ eigenvectors.T\n"
        "y = (z.flatten(1) @ W).reshape(x.shape)"
    )
    inverse_formula: ClassVar[str] = (
        "W = (eigenvectors * (eigenvalues + ridge).sqrt()) @ eigenvectors.T\n"
        "x = (y.flatten(1) @ W).reshape(y.shape) * mean_norm + mean_pixel"
    )

    tensors: ClassVar[Mapping[str, str]] = {
        "image_shape": IMAGE_SHAPE,
        "mean_pixel": "",
        "mean_norm": "",
        "eigenvectors": "d d",
        "eigenvalues": "d",
        "ridge": "",
    }

    image_shape: Tensor
    mean_pixel: Tensor
    mean_norm: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    ridge: Tensor

    @torch.no_grad()
    def __post_init__(self) -> None:
        self._shape = tuple(self.image_shape.tolist())
        # One product per batch instead of two; transforming a dataset is where the time goes.
        scale = (self.eigenvalues + self.ridge).rsqrt()
        self._matrix = (self.eigenvectors * scale) @ self.eigenvectors.T

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        images: Tensor,
        *,
        regularization: float = 0.1,
        chunk: int = 1000,
        max_dimension: int = MAX_DIMENSION,
    ) -> Self:
        """Fit on training images, on their device, in float64.

        Args:
            images: The training images [N, C, H, W], uint8, or floating point in [0, 1].
            regularization: The ridge as a multiple of the average eigenvalue, positive.
            chunk: Images per step; only memory and time depend on it.
            max_dimension: Largest C·H·W to accept; memory grows with its square.

        Raises:
            ValueError: An argument is not allowed, the images are larger than
                `max_dimension`, or every image is constant.
        """
        check_number("regularization", regularization, above=0)
        check_dimension(images, max_dimension)
        # Filled in place: small tensors kept from every chunk would sit between the freed large
        # ones and double the process's memory.
        means = torch.empty(len(images), dtype=torch.float64, device=images.device)
        norms = torch.empty_like(means)
        for index, part in enumerate(pixel_chunks(images, chunk)):
            _, mean, norm = normalize(part)
            means[index * chunk : (index + 1) * chunk] = mean.flatten()
            norms[index * chunk : (index + 1) * chunk] = norm.flatten()
        # An image that varies at all, by even one step of 1/255, is far above this.
        if bool(norms.max() < 2 * _NORM_FLOOR):
            raise ValueError("images are all constant; there is nothing to whiten")
        moment = second_moment(images, chunk, lambda part: normalize(part)[0]).div_(len(images))
        ridge = regularization * moment.trace() / len(moment)
        eigenvalues, eigenvectors = eigendecomposition(moment)
        return cls(
            torch.tensor(images.shape[1:], dtype=torch.int64, device=images.device),
            means.mean().to(torch.float32),
            norms.mean().to(torch.float32),
            eigenvectors,
            eigenvalues,
            ridge.to(torch.float32),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """See `PixelTransform.__call__`."""
        normalized, _, _ = normalize(as_pixels(images, self._shape))
        return (normalized.flatten(1) @ self._matrix).reshape(normalized.shape)

    def inverse(self, transformed: Tensor) -> Tensor:
        """Pixels with the training images' average mean and norm, for people to look at.

        V diag(√(λ + r)) Vᵀ y · (average norm) + (average mean); the matrix is undone exactly, each
        image's own mean and norm are gone. See `PixelTransform.inverse`.
        """
        values = as_float32("transformed", transformed, self._shape)
        scale = (self.eigenvalues + self.ridge).sqrt()
        flat = (values.flatten(1) @ self.eigenvectors * scale) @ self.eigenvectors.T
        return flat.reshape(values.shape) * self.mean_norm + self.mean_pixel


def normalize(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, C, H, W] with mean 0 and norm 1, and the mean and norm they had, [N, 1, 1, 1]."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    centered = pixels - mean
    # Smooth, so that every derivative is finite at a constant image, where a plain norm's is not.
    norm = (centered.square().sum((1, 2, 3), keepdim=True) + _NORM_FLOOR**2).sqrt()
    return centered / norm, mean, norm
