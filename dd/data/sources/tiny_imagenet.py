"""Tiny-ImageNet in the layout in which it is distributed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_path
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset
from dd.data.pictures import is_picture
from dd.data.sources.decoded_images import decoded_images
from dd.runtime.changes import Anytime, Judging
from dd.runtime.sizes import LARGEST_IMAGE

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_LAYOUT = "wnids.txt, train/<wnid>/images/ and val/ with val_annotations.txt of Tiny-ImageNet"


def tiny_imagenet(
    root: Judging[str | Path] = "data/tiny-imagenet-200",
    image_size: int = 64,
    cache_folder: Anytime[str | Path | None] = None,
) -> ImageDataset:
    """Tiny-ImageNet-200: 100,000 training and 10,000 test images [3, 64, 64], uint8, 200 classes.

    The classes are those that `wnids.txt` lists, in its order, so that a shorter list gives a
    smaller dataset. The validation images are the test set: the labels of the original test
    images were never published. Images are decoded once, into a cache that later runs
    memory-map; greyscale becomes RGB.

    Source: Le and Yang, "Tiny ImageNet visual recognition challenge", 2015.

    Args:
        root: The directory that holds `wnids.txt`; it is not downloaded.
        image_size: Height and width of the result; 64 leaves the images as they are.
        cache_folder: Where decoded images are kept; default: the environment variable
            `DD_CACHE`, or else the platform's folder for caches.

    Raises:
        DatasetNotFoundError: The directory does not have this layout, or lacks an image.
        ValueError: `image_size` is not positive, `wnids.txt` or the annotations make no
            sense, or an image cannot be decoded (the message names it).
        OSError: The cache cannot be written.
    """
    check_integer("image_size", image_size, 1, LARGEST_IMAGE)
    root = check_path("root", root)
    if cache_folder is not None:
        check_path("cache_folder", cache_folder)
    wnids = _lines(root, "wnids.txt")
    repeated = sorted({wnid for wnid in wnids if wnids.count(wnid) > 1})
    if repeated or not wnids:
        problem = f"{repeated[0]} twice" if repeated else "no class"
        raise ValueError(f"{root / 'wnids.txt'} lists {problem}; it must list each class once")
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = _training_images(root, label_of)
    test = _validation_images(root, label_of)
    images = {
        part: decoded_images(
            [str(path) for path, _ in files],
            root,
            image_size,
            f"tiny-imagenet-{part}",
            cache_folder,
        )
        for part, files in (("train", train), ("val", test))
    }
    return ImageDataset(
        name="tiny_imagenet",
        train_images=images["train"],
        train_labels=_labels(train),
        test_images=images["val"],
        test_labels=_labels(test),
        class_names=_class_names(root, wnids),
    )


def _training_images(root: Path, label_of: dict[str, int]) -> list[tuple[Path, int]]:
    files = []
    for wnid, label in label_of.items():
        folder = root / "train" / wnid / "images"
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [path for path in found if is_picture(path.name)]
        if not found:
            raise _not_found(root, f"training images of {wnid} in train/{wnid}/images/")
        files += [(path, label) for path in found]
    return files


def _validation_images(root: Path, label_of: dict[str, int]) -> list[tuple[Path, int]]:
    files = []
    annotations = Path("val") / "val_annotations.txt"
    for number, line in enumerate(_lines(root, str(annotations)), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ValueError(
                f"{root / annotations}, line {number} is {line!r}; it must be an image's name, a "
                "tab and a wnid"
            )
        name, wnid = fields[:2]
        if wnid in label_of:
            files.append((root / "val" / "images" / name, label_of[wnid]))
    missing = [path for path, _ in files if not path.is_file()]
    if missing or not files:
        what = f"val/images/{missing[0].name}" if missing else "validation images of these classes"
        raise _not_found(root, what)
    return files


def _class_names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first name of each class in `words.txt`, or its wnid."""
    words = root / "words.txt"
    entries = words.read_text("utf-8").splitlines() if words.is_file() else []
    names = dict(entry.split("\t", 1) for entry in entries if "\t" in entry)
    return tuple(names.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)


def _labels(files: list[tuple[Path, int]]) -> Tensor:
    return torch.tensor([label for _, label in files], dtype=torch.int64)


def _lines(root: Path, name: str) -> list[str]:
    if not (root / name).is_file():
        raise _not_found(root, _LAYOUT)
    return [line.strip() for line in (root / name).read_text("utf-8").splitlines() if line.strip()]


def _not_found(root: Path, expected: str) -> DatasetNotFoundError:
    remedy = f"unpack {_URL} and pass its folder as root"
    return DatasetNotFoundError.looked_in(root, expected, remedy)
