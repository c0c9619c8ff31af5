"""A user's own images from an `.npz` file."""

from __future__ import annotations

import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel.checks import check_choice, check_integer, check_number, check_path
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset
from dd.data.pictures import summary
from dd.data.sources.array_forms import (
    CLASS_NAMES,
    Array,
    as_classes,
    as_pixels,
    find_parts,
    is_known,
)
from dd.data.sources.parts import assembled
from dd.runtime.changes import Judging
from dd.runtime.sizes import LARGEST_SEED

_log = logging.getLogger(__name__)


def arrays(
    path: Judging[str | Path],
    test_fraction: float = 0.1,
    seed: int = 0,
    white: float | None = None,
    channels: str | None = None,
) -> ImageDataset:
    """Images and labels from an `.npz` file, as written by `numpy.savez`.

    The file holds

    - `images`: [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, or with 4, of which
      the last is opacity and is composited on white; uint8, integers of up to 16 bits, or floating
      point in [0, 1], or in [0, white];
    - `labels`: whole numbers [N] or [N, 1], 0 … K−1; or one-hot [N, K]; or strings [N], whose
      sorted different ones are the classes;
    - optionally `test_images` and `test_labels`, in the same form; without them a stratified
      part of the images becomes the test set;
    - optionally `val_images` and `val_labels`, which are used as the validation split;
    - optionally `class_names`: strings [K].

    `train_images` and `train_labels`, `x_train` and `y_train`, `x_test`, `y_val` and so on are
    understood as well, in any case. Other arrays are left out, and that is said.

    Args:
        path: The file; its stem becomes the dataset's name.
        test_fraction: Share held out as test set if the file has none, in (0, 1).
        seed: The same seed gives the same split.
        white: The value of white, such as 255 for floating point in [0, 255]; default: 255 in
            uint8, 1 in floating point, in other integers the least of 255, 4095 and 65535 that
            no image exceeds.
        channels: "first" or "last", for images whose shape allows both; default: by the shape.

    Raises:
        DatasetNotFoundError: There is no such file.
        ValueError: The file is damaged, pickled or incomplete, or its contents do not make a
            dataset; the message names the file and what is wrong.
    """
    check_integer("seed", seed, 0, LARGEST_SEED)
    if white is not None:
        check_number("white", white, above=0, maximum=2**32)
    if channels is not None:
        check_choice("channels", channels, ("first", "last"))
    path = check_path("path", path)
    if not path.is_file():
        raise DatasetNotFoundError.looked_in(
            path.parent, f"the file {path.name}", "write it with numpy.savez, or correct path"
        )
    content = read_npz(path)
    try:
        return _build(path.stem, content, test_fraction, seed, white, channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an `.npz` file whose names are known; what is left out is said.

    Raises:
        ValueError: It is damaged, or holds pickles; the message names it.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with archive:
                content = {name: archive[name] for name in archive.files if is_known(name)}
                others = sorted(set(archive.files) - content.keys())
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as an .npz file of plain arrays (object arrays and pickles "
            f"are refused): {error}"
        ) from error
    if not content:
        raise ValueError(
            f"{path}: it holds {others}; it must hold images and labels, or train_images and "
            "train_labels, or x_train and y_train"
        )
    if others:
        _log.warning("note: of %s these arrays are left out: %s", path, summary(others))
    return content


def _build(
    name: str,
    content: dict[str, Array],
    test_fraction: float,
    seed: int,
    white: float | None,
    channels: str | None,
) -> ImageDataset:
    class_names = content.pop(CLASS_NAMES, None)
    parts = find_parts(content)
    pixels = as_pixels({images: content[images] for images, _ in parts.values()}, white, channels)
    images = {part: pixels[name] for part, (name, _) in parts.items()}
    found = {part: as_classes(name, content[name]) for part, (_, name) in parts.items()}
    label_name = parts["train"][1]
    if found["train"][0].shape != images["train"].shape[:1]:
        raise ValueError(
            f"{label_name} has shape {found['train'][0].shape}; "
            f"for {len(images['train'])} images it must be ({len(images['train'])},)"
        )
    names = _class_names(class_names, label_name, *found["train"])
    labels = {part: _numbered(parts[part][1], values, names) for part, (values, _) in found.items()}
    return assembled(name, images, labels, names, test_fraction, seed)


def _class_names(
    given: Array | None, label_name: str, labels: Array, count: int
) -> tuple[str, ...]:
    """Those that the file gives, or those of the labels, of which there are at least `count`."""
    if given is not None:
        if given.dtype.kind != "U" or given.ndim != 1:
            raise ValueError(
                f"class_names has dtype {given.dtype} and shape {given.shape}; "
                "it must be strings [number of classes]"
            )
        return tuple(str(name) for name in given)
    if labels.dtype.kind == "U":
        return tuple(str(name) for name in np.unique(labels))
    highest = int(labels.max())
    # Checked before the names are made: a stray label must not allocate that many of them.
    if highest >= len(labels):
        raise ValueError(
            f"{label_name} goes up to {highest} with {len(labels)} images; labels must be "
            "0 … K−1 and every class needs a training image"
        )
    return tuple(str(label) for label in range(max(highest + 1, count)))


def _numbered(name: str, labels: Array, class_names: tuple[str, ...]) -> Tensor:
    """int64 [N]; strings by their place among the class names."""
    if labels.dtype.kind != "U":
        return torch.from_numpy(labels)
    number = {class_name: index for index, class_name in enumerate(class_names)}
    unknown = sorted(set(labels.tolist()) - number.keys())
    if unknown:
        raise ValueError(f"{name} has the class {unknown[0]!r}, which is none of the training set")
    return torch.tensor([number[label] for label in labels.tolist()])
