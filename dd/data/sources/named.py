"""What datasets have in common that a library knows by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bilevel.checks import check_integer, check_number
from dd.data.image_dataset import ImageDataset
from dd.data.pictures import check_reading, to_pixels
from dd.data.sources.parts import assembled
from dd.runtime.sizes import LARGEST_IMAGE, LARGEST_SEED


@final
@dataclass(frozen=True)
class Reading:
    """How a library's pictures become a dataset, as a source's parameters say it.

    Attributes:
        source: What the source is called, in errors.
        image_size: Height and width of the result; None: as they are, all of one size.
        fit: As in `dd.data.pictures.decode_image`.
        background: As there.
        test_fraction: Share of the training images held out where there is nothing to test on.
        seed: Of that.

    Raises:
        ValueError: A parameter outside its range.
    """

    source: str
    image_size: int | None
    fit: str
    background: str
    test_fraction: float
    seed: int

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0, LARGEST_SEED)
        check_reading(self.fit, self.background, None)
        if self.image_size is not None:
            check_integer("image_size", self.image_size, 1, LARGEST_IMAGE)
        check_number("test_fraction", self.test_fraction, above=0, below=1)

    def gathered(
        self, items: Iterable[tuple[Any, Any]], described: str
    ) -> tuple[Tensor, list[Any]]:
        """Pixels and labels of pairs (picture, label).

        Args:
            items: Pictures are Pillow's, or arrays or tensors of bytes.
            described: What errors and the progress bar call them.

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
            pixels = to_pixels(picture, self.image_size, fit=self.fit, background=self.background)
            if images and pixels.shape[1:] != images[0].shape[1:]:
                sizes = " and ".join(f"{w}×{h}" for _, h, w in (images[0].shape, pixels.shape))
                raise ValueError(
                    f"{described} are of {sizes} pixels; say {self.source}.image_size = 32"
                )
            images.append(pixels)
            labels.append(item[1])
        if not images:
            raise ValueError(f"there are no {described}")
        channels = max(len(pixels) for pixels in images)
        return torch.stack([pixels.expand(channels, -1, -1) for pixels in images]), labels

    def dataset(
        self,
        name: str,
        images: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        class_names: Sequence[str],
    ) -> ImageDataset:
        """As `assembled`; what has a validation split but no test set is tested on that."""
        images, labels = dict(images), dict(labels)
        if "test" not in images and "validation" in images:
            for parts in (images, labels):
                parts["test"] = parts.pop("validation")
        return assembled(name, images, labels, class_names, self.test_fraction, self.seed)


def _as_picture(item: Any, described: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    array = item.movedim(0, -1).numpy() if isinstance(item, Tensor) else np.asarray(item)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"{described} are {type(item).__name__}, no pictures")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
