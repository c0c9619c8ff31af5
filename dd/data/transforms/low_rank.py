"""Whitening by a few directions and a multiple of the identity: small enough to ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bilevel import ConfigurationError
from bilevel.checks import check_integer
from dd.data.transforms.base import PixelTransform, as_float32, as_pixels
from dd.data.transforms.declared import IMAGE_SHAPE
from dd.data.transforms.kip import KIPWhitening, normalize
from dd.data.transforms.zca import ZCAWhitening

_MATRIX = "(scales - rest)) @ vectors.T"
_INVERSE = "(1 / scales - 1 / rest)) @ vectors.T"


@final
@dataclass(eq=False, repr=False)
class LowRankKIP(PixelTransform):
    """`KIPWhitening` with W = a·I + V_k (D_k − a·I) V_kᵀ, where z is the image with norm 1.

    V_k are the k directions of the largest eigenvalues λ, and D_k = diag(λ + r)^(−1/2) their own
    factors. All others share a = Σ λ_i (λ_i + r)^(−1/2) / Σ λ_i: of all multiples of the identity
    the nearest to whitening in the mean square over the training images. It takes k·d floats, not
    d².

    Args:
        image_shape: (C, H, W), int64 [3].
        mean_pixel: Average over training images of their own mean, float32 [].
        mean_norm: Average over training images of their norm after that, float32 [].
        vectors: V_k, float32 [d, k] with d = C·H·W.
        scales: The diagonal of D_k, float32 [k].
        rest: A, float32 [].
    """

    kind: ClassVar[str] = "kip_low_rank"
    elementwise: ClassVar[bool] = False
    formula: ClassVar[str] = (
        "z = x - x.mean((1, 2, 3), keepdim=True)\n"
        "z = (z / (z.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()).flatten(1)\n"
        f"y = (rest * z + (z @ vectors * {_MATRIX}).reshape(x.shape)"
    )
    inverse_formula: ClassVar[str] = (
        "v = y.flatten(1)\n"
        f"x = (v / rest + (v @ vectors * {_INVERSE}).reshape(y.shape) * mean_norm + mean_pixel"
    )

    tensors: ClassVar[Mapping[str, str]] = {
        "image_shape": IMAGE_SHAPE,
        "mean_pixel": "",
        "mean_norm": "",
        "vectors": "d k",
        "scales": "k",
        "rest": "",
    }

    image_shape: Tensor
    mean_pixel: Tensor
    mean_norm: Tensor
    vectors: Tensor
    scales: Tensor
    rest: Tensor

    def __post_init__(self) -> None:
        self._shape = tuple(self.image_shape.tolist())

    @classmethod
    @torch.no_grad()
    def of(cls, full: KIPWhitening, rank: int) -> Self:
        """The nearest to a fitted whitening that keeps `rank` directions.

        Raises:
            ConfigurationError: `rank` is below 1, or not below d.
        """
        parts = _largest(full.eigenvectors, full.eigenvalues, full.ridge, rank)
        return cls(full.image_shape, full.mean_pixel, full.mean_norm, *parts)

    def __call__(self, images: Tensor) -> Tensor:
        """See `PixelTransform.__call__`."""
        normalized, _, _ = normalize(as_pixels(images, self._shape))
        return _product(normalized, self.vectors, self.scales, self.rest)

    def inverse(self, transformed: Tensor) -> Tensor:
        """As that of `KIPWhitening`; the matrix is undone exactly. See `PixelTransform.inverse`."""
        values = as_float32("transformed", transformed, self._shape)
        undone = _product(values, self.vectors, 1 / self.scales, 1 / self.rest)
        return undone * self.mean_norm + self.mean_pixel


@final
@dataclass(eq=False, repr=False)
class LowRankZCA(PixelTransform):
    """`ZCAWhitening` with W = a·I + U_k (D_k − a·I) U_kᵀ; see `LowRankKIP`.

    Args:
        mean: X̄, float32 [C, H, W].
        vectors: U_k, float32 [d, k] with d = C·H·W.
        scales: 1 / √(S_k + ε), float32 [k].
        rest: A, float32 [].
    """

    kind: ClassVar[str] = "zca_low_rank"
    elementwise: ClassVar[bool] = False
    formula: ClassVar[str] = (
        f"z = (x - mean).flatten(1)\ny = (rest * z + (z @ vectors * {_MATRIX}).reshape(x.shape)"
    )
    inverse_formula: ClassVar[str] = (
        f"v = y.flatten(1)\nx = (v / rest + (v @ vectors * {_INVERSE}).reshape(y.shape) + mean"
    )

    tensors: ClassVar[Mapping[str, str]] = {
        "mean": "C H W",
        "vectors": "d k",
        "scales": "k",
        "rest": "",
    }

    mean: Tensor
    vectors: Tensor
    scales: Tensor
    rest: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, full: ZCAWhitening, rank: int) -> Self:
        """The nearest to a fitted whitening that keeps `rank` directions.

        Raises:
            ConfigurationError: `rank` is below 1, or not below d.
        """
        parts = _largest(full.eigenvectors, full.eigenvalues, full.epsilon, rank)
        return cls(full.mean, *parts)

    def __call__(self, images: Tensor) -> Tensor:
        """See `PixelTransform.__call__`."""
        pixels = as_pixels(images, tuple(self.mean.shape))
        return _product(pixels - self.mean, self.vectors, self.scales, self.rest)

    def inverse(self, transformed: Tensor) -> Tensor:
        """The exact inverse; see `PixelTransform.inverse`."""
        values = as_float32("transformed", transformed, tuple(self.mean.shape))
        return _product(values, self.vectors, 1 / self.scales, 1 / self.rest) + self.mean


def _largest(
    vectors: Tensor, eigenvalues: Tensor, ridge: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """V_k, the factors of its directions, and that of all others; eigenvalues ascend."""
    check_integer("rank", rank)
    if rank >= len(eigenvalues):
        raise ConfigurationError(
            f"rank={rank}: images of {len(eigenvalues)} values have that many directions; it must "
            "be below, or None for all of them"
        )
    scales = (eigenvalues + ridge).rsqrt()
    others = eigenvalues[:-rank].double().clamp_min(1e-30)  # where all are 0, each counts alike
    rest = (others * scales[:-rank]).sum() / others.sum()
    return vectors[:, -rank:].contiguous(), scales[-rank:].clone(), rest.float()


def _product(images: Tensor, vectors: Tensor, scales: Tensor, rest: Tensor) -> Tensor:
    """W times every image."""
    rows = images.flatten(1)
    return (rest * rows + (rows @ vectors * (scales - rest)) @ vectors.T).reshape(images.shape)
