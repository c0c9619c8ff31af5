"""ZCA whitening, as MTT and ATT use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bilevel.checks import check_number
from dd.data.transforms.base import PixelTransform, as_float32, as_pixels
from dd.data.transforms.moments import (
    MAX_DIMENSION,
    check_dimension,
    eigendecomposition,
    mean_image,
    second_moment,
)


@final
@dataclass(eq=False, repr=False)
class ZCAWhitening(PixelTransform):
    """T (x − x̄) with T = U diag(1 / √(S + ε)) Uᵀ, on flattened pixels in [0, 1].

    x̄ is the mean image and U diag(S) Uᵀ the covariance of the training images, with divisor N − 1.

    Source: kornia's `ZCAWhitening(eps=0.1)`, as MTT (arXiv 2203.11932) and ATT (arXiv
    2407.14245) apply it. Use `fit`; the constructor takes tensors that were fitted.

    Args:
        mean: X̄, float32 [C, H, W].
        eigenvectors: U, float32 [d, d] with d = C·H·W, one in each column.
        eigenvalues: S, float32 [d].
        epsilon: ε, float32 [].
    """

    kind: ClassVar[str] = "zca"
    elementwise: ClassVar[bool] = False
    formula: ClassVar[str] = (
        "W = (eigenvectors * (eigenvalues + epsilon).rsqrt()) @ eigenvectors.T\n"
        "y = ((x - mean).flatten(1) @ W).reshape(x.shape)"
    )
    inverse_formula: ClassVar[str] = (
        "W = (eigenvectors * (eigenvalues + epsilon).sqrt()) @ eigenvectors.T\n"
        "x = (y.flatten(1) @ W).reshape(y.shape) + mean"
    )

    tensors: ClassVar[Mapping[str, str]] = {
        "mean": "C H W",
        "eigenvectors": "d d",
        "eigenvalues": "d",
        "epsilon": "",
    }

    mean: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    epsilon: Tensor

    @torch.no_grad()
    def __post_init__(self) -> None:
        # One product per batch instead of two; transforming a dataset is where the time goes.
        scale = (self.eigenvalues + self.epsilon).rsqrt()
        self._matrix = (self.eigenvectors * scale) @ self.eigenvectors.T

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        images: Tensor,
        *,
        epsilon: float = 0.1,
        chunk: int = 1000,
        max_dimension: int = MAX_DIMENSION,
    ) -> Self:
        """Fit on training images, on their device, in float64.

        Args:
            images: The training images [N, C, H, W], N ≥ 2, uint8, or floating point in [0, 1].
            epsilon: ε, positive.
            chunk: Images per step; only memory and time depend on it.
            max_dimension: Largest C·H·W to accept; memory grows with its square.

        Raises:
            ValueError: An argument is not allowed, or the images are larger than
                `max_dimension`.
        """
        check_number("epsilon", epsilon, above=0)
        if len(images) < 2:
            raise ValueError(f"images has {len(images)} images; a covariance needs at least 2")
        check_dimension(images, max_dimension)
        mean = mean_image(images, chunk)
        covariance = second_moment(images, chunk, lambda part: part - mean).div_(len(images) - 1)
        eigenvalues, eigenvectors = eigendecomposition(covariance)
        return cls(
            mean.to(torch.float32),
            eigenvectors,
            eigenvalues,
            torch.tensor(epsilon, dtype=torch.float32, device=images.device),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """See `PixelTransform.__call__`."""
        pixels = as_pixels(images, tuple(self.mean.shape))
        return ((pixels - self.mean).flatten(1) @ self._matrix).reshape(pixels.shape)

    def inverse(self, transformed: Tensor) -> Tensor:
        """The exact inverse, U diag(√(S + ε)) Uᵀ y + x̄; see `PixelTransform.inverse`."""
        values = as_float32("transformed", transformed, tuple(self.mean.shape))
        scale = (self.eigenvalues + self.epsilon).sqrt()
        flat = (values.flatten(1) @ self.eigenvectors * scale) @ self.eigenvectors.T
        return flat.reshape(values.shape) + self.mean
