"""The families of image transformations that augmentations draw from.

Every function maps `images` [N, C, H, W] to a tensor of the same shape, dtype and device,
drawing fresh parameters for each image from `generator`, on the generator's device. All are
differentiable once in `images`; `rotate` and `scale` go through `grid_sample`, which has no
second derivative, and whose backward pass on CUDA adds up in no fixed order.

The families and their published strengths are those of Differentiable Siamese Augmentation
(Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021,
arXiv 2102.08259). Below, u is uniform on [0, 1) and drawn for each image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def flip(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Mirror left and right where u < `probability`.

    Raises:
        ValueError: `images` is not a batch of images, or `probability` is not in [0, 1].
    """
    _require_between("probability", probability, 0.0, 1.0)
    (u,) = _uniform(1, images, generator)
    return torch.where(u < probability, images.flip(-1), images)


def rotate(images: Tensor, generator: torch.Generator, degrees: float) -> Tensor:
    """Rotate about the centre by an angle of (2u − 1)·`degrees`; zeros come in at the corners.

    Raises:
        ValueError: `images` is not a batch of images, or `degrees` is not in [0, 180].
    """
    _require_between("degrees", degrees, 0.0, 180.0)
    (u,) = _uniform(1, images, generator)
    angle = (2 * u - 1).flatten() * math.radians(degrees)
    # affine_grid measures both axes from −1 to 1: without the aspect ratio, the rotation of an
    # image that is not square would also shear it.
    aspect = images.shape[2] / images.shape[3]
    cos, sin = angle.cos(), angle.sin()
    return _resample(images, cos, -sin * aspect, sin / aspect, cos)


def scale(images: Tensor, generator: torch.Generator, ratio: float) -> Tensor:
    """Stretch width and height about the centre by independent factors.

    A factor is drawn as 1/`ratio` + u·(`ratio` − 1/`ratio`) and multiplies the sampling
    coordinates, so that a factor above 1 shrinks the content and zeros come in at the border.

    Raises:
        ValueError: `images` is not a batch of images, or `ratio` is below 1.
    """
    _require_between("ratio", ratio, 1.0, math.inf)
    factors = 1 / ratio + _uniform(2, images, generator) * (ratio - 1 / ratio)
    x, y = factors.flatten(1)
    zero = torch.zeros_like(x)
    return _resample(images, x, zero, zero, y)


def crop(images: Tensor, generator: torch.Generator, padding: float) -> Tensor:
    """Pad with zeros on every side, and cut out a window of the original size.

    The padding is `padding` times the height above and below and times the width left and
    right, rounded half up; the window is uniform over all whole-pixel positions.

    Raises:
        ValueError: `images` is not a batch of images, or `padding` is not in [0, 1].
    """
    _require_between("padding", padding, 0.0, 1.0)
    count, channels, height, width = _require_images(images)
    above, left = _round_half_up(height * padding), _round_half_up(width * padding)
    rows = _integers(2 * above + 1, images, generator) + _pixels(images, height)
    columns = _integers(2 * left + 1, images, generator) + _pixels(images, width)
    padded = F.pad(images, (left, left, above, above))
    index = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    index = index.reshape(count, 1, height * width).expand(count, channels, height * width)
    return padded.flatten(2).gather(2, index).reshape(images.shape)


def cutout(images: Tensor, generator: torch.Generator, fraction: float) -> Tensor:
    """Set a rectangle to zero.

    Its sides are `fraction` times the height and the width, rounded half up. Its centre is
    uniform over the image, so that it may stick out over the border.

    Raises:
        ValueError: `images` is not a batch of images, or `fraction` is not in [0, 1].
    """
    _require_between("fraction", fraction, 0.0, 1.0)
    height, width = _require_images(images)[2:]
    inside_rows = _random_interval(height, fraction, images, generator)
    inside_columns = _random_interval(width, fraction, images, generator)
    hole = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return images.masked_fill(hole, 0.0)


def brightness(images: Tensor, generator: torch.Generator, ratio: float) -> Tensor:
    """Shift every pixel of an image: x + (u − 1/2)·`ratio`.

    Raises:
        ValueError: `images` is not a batch of images, or `ratio` is negative.
    """
    _require_between("ratio", ratio, 0.0, math.inf)
    (u,) = _uniform(1, images, generator)
    return images + (u - 0.5) * ratio


def saturation(images: Tensor, generator: torch.Generator, ratio: float) -> Tensor:
    """Scale the distance of every pixel to its mean m over channels: m + (x − m)·u·`ratio`.

    Raises:
        ValueError: `images` is not a batch of images, or `ratio` is negative.
    """
    _require_between("ratio", ratio, 0.0, math.inf)
    (u,) = _uniform(1, images, generator)
    mean = images.mean(1, keepdim=True)
    return mean + (images - mean) * (u * ratio)


def contrast(images: Tensor, generator: torch.Generator, ratio: float) -> Tensor:
    """Scale the distance of every pixel to the image's mean m: m + (x − m)·(u + `ratio`).

    Raises:
        ValueError: `images` is not a batch of images, or `ratio` is negative.
    """
    _require_between("ratio", ratio, 0.0, math.inf)
    (u,) = _uniform(1, images, generator)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (u + ratio)


def _require_images(images: Tensor) -> torch.Size:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images has shape {tuple(images.shape)} and dtype {images.dtype}; "
            "it must be a floating-point tensor [N, C, H, W]"
        )
    return images.shape


def _require_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be in [{low}, {high}]")


def _round_half_up(value: float) -> int:
    # The published code's rounding; Python's own rounds half to even.
    return math.floor(value + 0.5)


def _to_images(draw: Tensor, images: Tensor) -> Tensor:
    # From host memory to a GPU, non_blocking saves the host from waiting for the stream; in the
    # other direction the host could read the result before it is there.
    return draw.to(images.device, non_blocking=images.is_cuda)


def _uniform(rows: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """[rows, N, 1, 1, 1], uniform on [0, 1), of the dtype of images."""
    shape = (rows, _require_images(images)[0], 1, 1, 1)
    # float32 whatever the dtype of images, which so sees the same draw in every precision.
    draw = torch.rand(shape, dtype=torch.float32, device=generator.device, generator=generator)
    return _to_images(draw.to(images.dtype), images)


def _integers(high: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 1], uniform on {0 … high − 1}."""
    shape = (images.shape[0], 1)
    draw = torch.randint(high, shape, device=generator.device, generator=generator)
    return _to_images(draw, images)


def _pixels(images: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=images.device)


def _random_interval(
    size: int, fraction: float, images: Tensor, generator: torch.Generator
) -> Tensor:
    """[N, size], true on a run of fraction·size pixels about a random centre."""
    length = _round_half_up(size * fraction)
    # An even run has its centre between two pixels, for which there is one more place.
    first = _integers(size + 1 - length % 2, images, generator) - length // 2
    pixels = _pixels(images, size)
    return (pixels >= first) & (pixels < first + length)


def _resample(images: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Sample each image at the coordinates (xx·x + xy·y, yx·x + yy·y), about its centre."""
    zero = torch.zeros_like(xx)
    matrix = torch.stack((xx, xy, zero, yx, yy, zero), dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
