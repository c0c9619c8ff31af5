"""Smaller images, and back."""

from torch import Tensor
from torch.nn import functional as F

from bilevel import ConfigurationError


def downscaled(images: Tensor, factor: int) -> Tensor:
    """Images [N, C, H, W] at 1/f of their size, each pixel the mean of f×f."""
    return images if factor == 1 else F.avg_pool2d(images, factor)


def upscaled(images: Tensor, factor: int) -> Tensor:
    """Images [N, C, h, w] at f times their size, by bilinear interpolation; linear in them."""
    if factor == 1:
        return images
    return F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)


def check_divides(owner: str, factor: int, image_shape: tuple[int, ...]) -> None:
    """Refuse images [C, H, W] whose sides are no multiple of f.

    Raises:
        ConfigurationError: They are not.
    """
    _, height, width = image_shape
    if height % factor or width % factor:
        raise ConfigurationError(
            f"{owner} with factor={factor}: images are {height}×{width}; both must be a multiple "
            "of it"
        )
