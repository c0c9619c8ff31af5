"""Image files on disk: finding and decoding them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from dd.data.image_dataset import DatasetNotFoundError

__all__ = ["check_same_classes", "decode_image", "list_class_folders"]


def list_class_folders(
    directory: Path, root: Path, layout: str
) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """Paths, labels (int64) and class names of the images below one folder a class, all sorted.

    Args:
        directory: the folder of class folders.
        root: what an error says was looked in.
        layout: what an error says was expected there.

    Raises:
        DatasetNotFoundError: if there is no such folder, or a class is empty.
    """
    try:
        listing = ImageFolder(str(directory))
    except FileNotFoundError as error:
        raise DatasetNotFoundError.looked_in(
            root, layout, f"arrange the image files so ({error})"
        ) from error
    paths = [path for path, _ in listing.samples]
    return paths, torch.tensor(listing.targets, dtype=torch.int64), tuple(listing.classes)


def check_same_classes(
    root: Path, names: tuple[str, ...], test_names: tuple[str, ...], test_folder: str
) -> None:
    """Raise ``ValueError`` unless ``train/`` and the test folder have the same classes."""
    different = sorted(set(names) ^ set(test_names))
    if different:
        raise ValueError(
            f"{root.absolute()}: train/ and {test_folder}/ must have the same classes; "
            f"only one of them has {different[0]!r}"
        )


def decode_image(path: str, image_size: int) -> Tensor:
    """One image as RGB, uint8 [3, image_size, image_size]; may be called from any thread.

    The shorter side is resized to ``image_size`` (bilinear, antialiased) and the centre is
    cropped; greyscale becomes RGB, its 16 bits, if it has so many, the upper 8 of them.

    Raises:
        ValueError: if the file cannot be decoded, or its pixels are no integers of 8 or 16 bits;
            the message names it.
    """
    try:
        with Image.open(path) as file:
            image = _eight_bits(file).convert("RGB")
    # Pillow reports damage as any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the image {path}: {error}") from error
    resized = functional.resize(
        image, [image_size], functional.InterpolationMode.BILINEAR, antialias=True
    )
    return functional.pil_to_tensor(functional.center_crop(resized, [image_size, image_size]))


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image, or if its pixels are wider than a byte, which `convert` would clip, scaled."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError(f"its pixels are neither of 8 nor of 16 bits (mode {image.mode})")
    return Image.fromarray((pixels // 256).astype(np.uint8))
