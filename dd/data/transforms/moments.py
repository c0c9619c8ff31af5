"""Moments of a set of images, in bounded memory, and their eigendecomposition."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bilevel.checks import check_integer
from dd.data.image_dataset import to_unit_range

MAX_DIMENSION = 12288
"""Largest C·H·W that whitening accepts by default: 64×64 RGB."""

_BLOCKS = 8


def pixel_chunks(images: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield the images as float64 pixels in [0, 1], `chunk` at a time.

    Args:
        images: [N, C, H, W], uint8, or floating point in [0, 1].
        chunk: Images per chunk, at least 1.

    Raises:
        ValueError: `chunk` is not positive, or the shape, dtype or range is not allowed.
    """
    check_integer("chunk", chunk)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; it must be [N, C, H, W] and not empty"
        )
    for start in range(0, len(images), chunk):
        yield to_unit_range(images[start : start + chunk]).to(torch.float64)


def check_dimension(images: Tensor, max_dimension: int) -> None:
    """Refuse images whose whitening would not fit in memory.

    Raises:
        ValueError: Images [N, C, H, W] have C·H·W > `max_dimension`.
    """
    check_integer("max_dimension", max_dimension)
    dimension = images[0].numel() if len(images) else 0
    if dimension > max_dimension:
        raise ValueError(
            f"images have {' × '.join(map(str, images.shape[1:]))} = {dimension} values each, "
            f"beyond max_dimension = {max_dimension}: the covariance alone would take "
            f"{dimension**2 * 8 / 1e9:.1f} GB, and its eigendecomposition several times that; "
            "use Standardize, smaller images, or a larger max_dimension if the memory is there"
        )


def mean_image(images: Tensor, chunk: int) -> Tensor:
    """The average image, float64 [C, H, W]."""
    return torch.as_tensor(sum(part.sum(0) for part in pixel_chunks(images, chunk))) / len(images)


def second_moment(images: Tensor, chunk: int, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ_i z_i z_iᵀ with z_i = `prepare`(x_i) flattened, float64 [d, d].

    Args:
        images: [N, C, H, W], uint8, or floating point in [0, 1].
        chunk: Images per step.
        prepare: Maps float64 pixels [n, C, H, W] to the same shape, each image on its own.
    """
    dimension = images[0].numel()
    total = torch.zeros(dimension, dimension, dtype=torch.float64, device=images.device)
    block = -(-dimension // _BLOCKS)
    for part in pixel_chunks(images, chunk):
        rows = prepare(part).flatten(1)
        # The result is symmetric: the blocks above the diagonal are nearly half of the work.
        for start in range(0, dimension, block):
            stop = start + block
            total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
    upper = total.triu_()
    return upper + upper.triu(1).T


def eigendecomposition(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [d], ascending and not negative, and eigenvectors [d, d], both float32.

    Args:
        moment: float64 [d, d], symmetric positive semi-definite.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    return eigenvalues.clamp_min_(0).to(torch.float32), eigenvectors.to(torch.float32).contiguous()
