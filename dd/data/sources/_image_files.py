"""Image files on disk: finding and decoding them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from dd.data.errors import DatasetNotFoundError

__all__ = ["decode_image", "list_class_folders"]


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


def decode_image(path: str, image_size: int) -> Tensor:
    """One image as RGB, uint8 [3, image_size, image_size]; may be called from any thread.

    The shorter side is resized to ``image_size`` (bilinear, antialiased) and the centre is
    cropped; greyscale becomes RGB.

    Raises:
        ValueError: if the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow reports damage as any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the image {path}: {error}") from error
    resized = functional.resize(
        image, [image_size], functional.InterpolationMode.BILINEAR, antialias=True
    )
    return functional.pil_to_tensor(functional.center_crop(resized, [image_size, image_size]))
