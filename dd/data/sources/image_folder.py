"""A user's own image files, one folder a class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel.checks import check_integer
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset, stratified_split
from dd.data.sources.image_files import check_same_classes, decode_image, list_class_folders
from dd.runtime.changes import Judging

__all__ = ["image_folder"]

_LAYOUT = "train/<class>/<image files> and test/<class>/<image files>, or <class>/<image files>"


def image_folder(
    root: Judging[str | Path], image_size: int, test_fraction: float = 0.1, seed: int = 0
) -> ImageDataset:
    """Image files in one folder a class, as RGB uint8 images [3, image_size, image_size].

    ``root`` holds ``train/<class>/`` and ``test/<class>/``, or only ``<class>/``, of which a
    stratified part then becomes the test set. The shorter side of each image is resized to
    ``image_size`` (bilinear, antialiased) and the centre is cropped; greyscale becomes RGB.

    Args:
        root: the directory; its name becomes the dataset's name.
        image_size: height and width of the result, at least 1.
        test_fraction: share held out as test set if there is no ``test/``, in (0, 1).
        seed: the same seed gives the same split.

    Raises:
        DatasetNotFoundError: if the directory does not have this layout or a class is empty.
        ValueError: if ``image_size`` is not positive, the classes of ``train/`` and ``test/``
            differ, a split is impossible, or an image cannot be decoded (the message names it).
    """
    check_integer("image_size", image_size)
    root = Path(root)
    subsets = [part for part in ("train", "test") if (root / part).is_dir()]
    if len(subsets) == 1:
        missing = "test" if subsets == ["train"] else "train"
        raise DatasetNotFoundError.looked_in(
            root,
            f"{missing}/ beside {subsets[0]}/",
            f"add it, or pass root={str(root / subsets[0])!r} to split that folder",
        )
    if subsets:
        train_paths, train_labels, class_names = list_class_folders(root / "train", root, _LAYOUT)
        test_paths, test_labels, test_names = list_class_folders(root / "test", root, _LAYOUT)
        check_same_classes(root, class_names, test_names, "test")
    else:
        paths, labels, class_names = list_class_folders(root, root, _LAYOUT)
        train, test = stratified_split(labels, test_fraction, seed, "test_fraction")
        train_paths, train_labels = [paths[index] for index in train.tolist()], labels[train]
        test_paths, test_labels = [paths[index] for index in test.tolist()], labels[test]
    return ImageDataset(
        name=root.absolute().name,
        train_images=_decode(train_paths, image_size, "training images"),
        train_labels=train_labels,
        test_images=_decode(test_paths, image_size, "test images"),
        test_labels=test_labels,
        class_names=class_names,
    )


def _decode(paths: list[str], image_size: int, description: str) -> Tensor:
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    # disable=None: no bar where the output is not a terminal.
    for index, path in enumerate(tqdm(paths, desc=description, unit="image", disable=None)):
        images[index] = decode_image(path, image_size)
    return images
