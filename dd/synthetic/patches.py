"""Images as grids of square patches."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from bilevel import ConfigurationError
from bilevel.checks import check_integer
from dd.synthetic.parameterisation import Parameterisation, norms_of


def split_patches(images: Tensor, patches_per_side: int) -> Tensor:
    """Cut images into n×n patches that do not overlap.

    Args:
        images: [N, C, H, W], with H and W multiples of n.
        patches_per_side: N ≥ 1.

    Returns:
        [N·n², C, H/n, W/n], image by image, the patches of each row by row.

    Raises:
        ValueError: H or W is no multiple of n.
    """
    n = patches_per_side
    count, channels, height, width = images.shape
    if height % n or width % n:
        raise ValueError(
            f"patches_per_side={n}: images of {height}×{width} cannot be cut into {n}×{n} patches"
        )
    grid = images.reshape(count, channels, n, height // n, n, width // n)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // n, width // n)


def compose_patches(patches: Tensor, patches_per_side: int) -> Tensor:
    """Put patches together again: the inverse of `split_patches`, differentiable.

    Args:
        patches: [N·n², C, h, w].
        patches_per_side: N ≥ 1.

    Returns:
        [N, C, n·h, n·w].
    """
    n = patches_per_side
    _, channels, height, width = patches.shape
    grid = patches.reshape(-1, n, n, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, n * height, n * width)


@final
class Patches(Parameterisation):
    """Every image is stored as n×n patches: `images`, float32 [K·I·n², C, H/n, W/n].

    Each patch has its own norm where norms are projected, and its own bound where
    `MovingAverageRowClip` clips their hypergradient.

    Args:
        patches_per_side: N; 4 for images of 64×64 and more in patch-wise semantic preservation.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: AT-BPTT, arXiv 2510.04838.
    """

    lossless = True

    def __init__(self, patches_per_side: int) -> None:
        self.patches_per_side = check_integer("patches_per_side", patches_per_side)

    def encode(self, images: Tensor, num_classes: int) -> dict[str, Tensor]:
        try:
            return {"images": split_patches(images, self.patches_per_side)}
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def decode(self, stored: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        patches = stored["images"]
        if index is not None:
            patches = patches.unflatten(0, (-1, self.patches_per_side**2))[index].flatten(0, 1)
        return compose_patches(patches, self.patches_per_side)

    def project_(self, stored: Mapping[str, Tensor]) -> None:
        """Scale every patch to L2 norm 1/n."""
        patches = stored["images"]
        patches.div_(norms_of(patches).mul_(self.patches_per_side).view(-1, 1, 1, 1))
