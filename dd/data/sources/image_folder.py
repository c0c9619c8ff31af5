"""A user's own image files, one folder a class."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel.checks import check_integer, check_path
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset, stratified_split
from dd.data.pictures import check_reading, decode_image, is_picture, survey
from dd.data.sources.image_files import check_same_classes, list_class_folders
from dd.runtime.changes import Judging
from dd.runtime.sizes import LARGEST_IMAGE, LARGEST_SEED

_LAYOUT = "train/<class>/<image files> and test/<class>/<image files>, or <class>/<image files>"
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
_log = logging.getLogger(__name__)


def image_folder(
    root: Judging[str | Path],
    image_size: int,
    test_fraction: float = 0.1,
    seed: int = 0,
    fit: str = "crop",
    background: str = "white",
    white: int | None = None,
) -> ImageDataset:
    """Image files in one folder a class, as RGB uint8 images [3, image_size, image_size].

    `root` holds `train/<class>/` and `test/<class>/`, or only `<class>/`, of which a
    stratified part then becomes the test set. `val/<class>/`, also called `valid/`,
    `validation/` or `dev/`, beside `train/` is used as the validation split. Case does not
    matter. How a picture becomes pixels: `dd.data.pictures.decode_image`.

    Args:
        root: The directory; its name becomes the dataset's name.
        image_size: Height and width of the result, at least 1.
        test_fraction: Share held out as test set if there is no `test/`, in (0, 1).
        seed: The same seed gives the same split.
        fit: How a picture becomes square: "crop" keeps the centre, "pad" keeps all of it.
        background: The colour under transparent pixels, and around pictures that are padded.
        white: The value of white where a channel has 16 bits: 255, 1023, 4095, 16383 or 65535;
            default: the least of 255, 4095 and 65535 that no pixel of the pictures exceeds, which
            is said.

    Raises:
        DatasetNotFoundError: The directory does not have this layout or a class is empty.
        ValueError: `image_size` is not positive, the classes of the splits differ, a split is
            impossible, or an image cannot be decoded (the message names it).
    """
    check_integer("image_size", image_size, 1, LARGEST_IMAGE)
    check_integer("seed", seed, 0, LARGEST_SEED)
    check_reading(fit, background, white)
    root = check_path("root", root)
    folders = _split_folders(root)
    directory = root / folders["train"] if folders else root
    paths, labels, class_names = list_class_folders(directory, root, _LAYOUT)
    validation_paths: list[str] = []
    validation_rows = None
    for part in ("test", "validation"):
        if part not in folders:
            continue
        found, found_labels, names = list_class_folders(root / folders[part], root, _LAYOUT)
        check_same_classes(root, class_names, names, folders[part])
        if part == "test":
            test_paths, test_labels = found, found_labels
        else:
            validation_paths, validation_labels = found, found_labels
    if "test" not in folders:
        train, test = stratified_split(labels, test_fraction, seed, "test_fraction", class_names)
        test_paths, test_labels = [paths[index] for index in test.tolist()], labels[test]
        paths, labels = [paths[index] for index in train.tolist()], labels[train]
    if validation_paths:
        validation_rows = torch.arange(len(paths), len(paths) + len(validation_paths))
        paths, labels = paths + validation_paths, torch.cat([labels, validation_labels])
    white = survey([*paths, *test_paths], white)
    read = partial(decode_image, fit=fit, background=background, white=white)
    return ImageDataset(
        name=root.absolute().name,
        train_images=_decode(paths, image_size, read, "training images"),
        train_labels=labels,
        test_images=_decode(test_paths, image_size, read, "test images"),
        test_labels=test_labels,
        class_names=class_names,
        validation_rows=validation_rows,
    )


def _split_folders(root: Path) -> dict[str, str]:
    """What the folders of the splits are called, or nothing if `root` holds the classes."""
    folders: dict[str, str] = {}
    inside = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for name in inside:
        part = _SPLITS.get(name.lower())
        if part is None:
            continue
        if part in folders:
            if part == "validation" and not folders.keys() & {"train", "test"}:
                continue  # two classes, "valid" and "validation", if no other split follows
            raise DatasetNotFoundError.looked_in(
                root, f"one folder of the {part} split", f"keep one of {folders[part]}/ and {name}/"
            )
        folders[part] = name
    if folders.keys() == {"validation"}:
        return {}  # a class may be called "valid"
    if (
        len(folders) == 1
        and len(inside) > 1
        and _holds_pictures(root / next(iter(folders.values())))
    ):
        return {}  # or "train", among other vehicles
    if folders.keys() == {"train"} or (folders and "train" not in folders):
        there = next(iter(folders.values()))
        missing = "test" if "train" in folders else "train"
        raise DatasetNotFoundError.looked_in(
            root,
            f"{missing}/ beside {there}/",
            f"add it, or pass root={str(root / there)!r} to split that folder",
        )
    if folders and "test" not in folders:
        _log.warning(
            "note: %s has no test/; a part of %s/ becomes the test set", root, folders["train"]
        )
    return folders


def _holds_pictures(folder: Path) -> bool:
    return any(is_picture(path.name) and not path.is_dir() for path in folder.iterdir())


def _decode(
    paths: list[str], image_size: int, read: Callable[..., Tensor], description: str
) -> Tensor:
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    # disable=None: no bar where the output is not a terminal.
    for index, path in enumerate(tqdm(paths, desc=description, unit="image", disable=None)):
        images[index] = read(path, image_size)
    return images
