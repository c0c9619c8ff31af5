"""Synthetic images as people look at them."""

import io

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

#: Classes and images of each that are shown at most, and the least side of an image in pixels.
MOST_CLASSES = 20
MOST_ROWS = 10
LEAST_SIDE = 64


def stretched(pixels: Tensor) -> Tensor:
    """Every image [N, C, H, W] stretched to the range [0, 1]."""
    low, high = (bound(pixels, (1, 2, 3), keepdim=True) for bound in (torch.amin, torch.amax))
    return (pixels - low) / (high - low).clamp_min(1e-6)


def image_grid(pixels: Tensor, images_per_class: int) -> Tensor:
    """The first images of each class as one picture [3, H', W'].

    A column for each class; with one image per class, rows of five or ten.
    """
    by_class = pixels.detach().cpu().unflatten(0, (-1, images_per_class))[:MOST_CLASSES]
    if images_per_class == 1:
        shown, columns = by_class[:, 0], 5 if len(by_class) <= 10 else 10
    else:
        columns = len(by_class)
        shown = by_class[:, :MOST_ROWS].transpose(0, 1).flatten(0, 1)
    factor = -(-LEAST_SIDE // shown.shape[-1])
    shown = torch.nn.functional.interpolate(shown, scale_factor=factor, mode="nearest")
    return make_grid(shown, nrow=columns, padding=2, pad_value=1.0)


def png(pixels: Tensor, images_per_class: int) -> bytes:
    """The grid of stretched images as a PNG file."""
    buffer = io.BytesIO()
    to_pil_image(image_grid(stretched(pixels), images_per_class)).save(buffer, "PNG")
    return buffer.getvalue()
