"""CIFAR-10 and CIFAR-100, through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from bilevel.checks import check_flag, check_path
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset
from dd.runtime.changes import Judging


def cifar10(root: Judging[str | Path] = "data", download: Judging[bool] = True) -> ImageDataset:
    """CIFAR-10: 50,000 training and 10,000 test images [3, 32, 32], uint8, 10 classes.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Args:
        root: The directory that holds `cifar-10-batches-py/`.
        download: Fetch the data into `root` if it is not there.

    Raises:
        DatasetNotFoundError: The data is not there, or is damaged, and was not downloaded.
    """
    return _cifar("cifar10", datasets.CIFAR10, "cifar-10-batches-py", root, download)


def cifar100(root: Judging[str | Path] = "data", download: Judging[bool] = True) -> ImageDataset:
    """CIFAR-100: 50,000 training and 10,000 test images [3, 32, 32], uint8, 100 fine classes.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Args:
        root: The directory that holds `cifar-100-python/`.
        download: Fetch the data into `root` if it is not there.

    Raises:
        DatasetNotFoundError: The data is not there, or is damaged, and was not downloaded.
    """
    return _cifar("cifar100", datasets.CIFAR100, "cifar-100-python", root, download)


def _cifar(name: str, source: Any, folder: str, root: str | Path, download: bool) -> ImageDataset:
    root = check_path("root", root)
    check_flag("download", download)
    train = _open_training_set(source, folder, root, download)
    test = source(root=str(root), train=False, download=False)
    return ImageDataset(
        name=name,
        train_images=_channels_first(train.data),
        train_labels=torch.tensor(train.targets, dtype=torch.int64),
        test_images=_channels_first(test.data),
        test_labels=torch.tensor(test.targets, dtype=torch.int64),
        class_names=tuple(train.classes),
    )


def _open_training_set(source: Any, folder: str, root: Path, download: bool) -> Any:
    expected = f"an intact copy of {folder}/"
    try:
        return source(root=str(root), train=True, download=False)
    except RuntimeError as error:
        if not download:
            remedy = f"pass download=True, or pass as root the directory that holds {folder}/"
            raise DatasetNotFoundError.looked_in(root, expected, remedy) from error
    try:
        return source(root=str(root), train=True, download=True)
    # Without a network urllib raises URLError, which is an OSError.
    except (RuntimeError, OSError) as error:
        remedy = (
            f"downloading it there failed ({error}): check the network and that the directory "
            f"can be written, or unpack {source.url} there by hand"
        )
        raise DatasetNotFoundError.looked_in(root, expected, remedy) from error


def _channels_first(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
