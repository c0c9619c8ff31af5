"""A dataset from its parts: pictures in memory made pixels, and the splits put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dd.data.image_dataset import ImageDataset, stratified_split
from dd.data.pictures import to_pixels


def assembled(
    name: str,
    images: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    class_names: Sequence[str],
    test_fraction: float,
    seed: int,
) -> ImageDataset:
    """A dataset from the parts "train" and, if they are there, "test" and "validation".

    Args:
        name: Of the dataset.
        images: Of each part, [N, C, H, W].
        labels: Of each part, int64 [N].
        class_names: K names.
        test_fraction: Share of "train" that is held out where there is no "test".
        seed: Of that.

    Raises:
        ValueError: They make no dataset.
    """
    images, labels, rows = dict(images), dict(labels), None
    if "test" not in images:
        train, test = stratified_split(
            labels["train"], test_fraction, seed, "test_fraction", class_names
        )
        for each in (images, labels):
            each["test"], each["train"] = each["train"][test], each["train"][train]
    if "validation" in images:
        count = len(images["train"])
        rows = torch.arange(count, count + len(images["validation"]))
        for each in (images, labels):
            each["train"] = torch.cat([each["train"], each["validation"]])
    names = tuple(class_names)
    return ImageDataset(
        name, images["train"], labels["train"], images["test"], labels["test"], names, rows
    )


def gathered(
    items: Iterable[tuple[Any, Any]],
    described: str,
    size_parameter: str,
    image_size: int | None,
    fit: str,
    background: str,
) -> tuple[Tensor, list[Any]]:
    """Pixels and labels of pairs (picture, label).

    Args:
        items: Pictures are Pillow's, or arrays or tensors of bytes.
        described: What errors and the progress bar call them.
        size_parameter: What an error says must be given where sizes differ.
        image_size: Height and width of the result; None: as they are, all of one size.
        fit: As in `dd.data.pictures.decode_image`.
        background: As there.

    Returns:
        uint8 [N, C, H, W], with C = 1 if all are grey and else 3, and the N labels.

    Raises:
        ValueError: An item is no picture with a label, or their sizes differ.
    """
    images: list[Tensor] = []
    labels: list[Any] = []
    for item in tqdm(items, desc=described, unit="image", disable=None):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"{described} are no pairs of a picture and a label")
        picture = _as_picture(item[0], described)
        pixels = to_pixels(picture, image_size, fit=fit, background=background)
        if images and pixels.shape[1:] != images[0].shape[1:]:
            sizes = " and ".join(f"{w}×{h}" for _, h, w in (images[0].shape, pixels.shape))
            raise ValueError(f"{described} are of {sizes} pixels; say {size_parameter} = 32")
        images.append(pixels)
        labels.append(item[1])
    if not images:
        raise ValueError(f"there are no {described}")
    channels = max(len(pixels) for pixels in images)
    return torch.stack([pixels.expand(channels, -1, -1) for pixels in images]), labels


def _as_picture(item: Any, described: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    array = item.movedim(0, -1).numpy() if isinstance(item, Tensor) else np.asarray(item)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"{described} are {type(item).__name__}, no pictures")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
