"""A labelled image dataset, in memory or memory-mapped; its splits; the error of one not found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from bilevel.checks import check_integer, check_number
from dd.data.checks import (
    check_images,
    check_labels,
    check_unit_range,
    warn_of_degenerate,
    warn_of_few,
    warn_of_twins,
)
from dd.runtime.cache import checksum
from dd.runtime.sizes import LARGEST_SEED

#: How many images tell one dataset from another; a large one need not be read for it.
FINGERPRINT_IMAGES = 1000


@final
class DatasetNotFoundError(FileNotFoundError):
    """A dataset is not where it was looked for; the message says where, for what and what to do."""

    @classmethod
    def looked_in(cls, directory: Path, expected: str, remedy: str) -> DatasetNotFoundError:
        """Build the error.

        Args:
            directory: Where the data was looked for; shown as an absolute path.
            expected: What should have been there.
            remedy: What the user can do about it.
        """
        return cls(f"looked in {directory.absolute()} for {expected}; {remedy}")


def to_unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1].

    Args:
        images: uint8, scaled by 1/255, or floating point in [0, 1], any shape.

    Returns:
        A float32 tensor of the same shape on the same device.

    Raises:
        ValueError: The dtype is neither, or a floating point value lies outside [0, 1].
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    if not images.is_floating_point():
        raise ValueError(
            f"images has dtype {images.dtype}; allowed are torch.uint8 and floating point in [0, 1]"
        )
    check_unit_range("images", images)
    return images.to(torch.float32)


@final
@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Training and test images with hard labels, in memory or in memory-mapped files.

    Nothing writes to the images.

    Attributes:
        name: What reports and artifacts call it.
        train_images: [N, C, H, W], uint8, or float32 in [0, 1].
        train_labels: int64 [N], in [0, num_classes); every class occurs.
        test_images: [M, C, H, W], of the same dtype.
        test_labels: int64 [M], in [0, num_classes).
        class_names: One name per class, in label order.
        validation_rows: Which training images are a validation split of the dataset's own, int64;
            None if it has none.

    Raises:
        ValueError: One of these does not hold; the message names the field.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    validation_rows: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.class_names:
            raise ValueError("class_names is empty; it must name at least one class")
        for name in self.class_names:
            if name.encode(errors="ignore").decode() != name:
                raise ValueError(f"the name of the class {name!a} is no UTF-8: rename it")
        self._check_part("train", self.train_images, self.train_labels)
        self._check_part("test", self.test_images, self.test_labels)
        if self.test_images.shape[1:] != self.train_images.shape[1:]:
            raise ValueError(
                f"test_images has images of shape {tuple(self.test_images.shape[1:])}; "
                f"train_images has {tuple(self.train_images.shape[1:])}, and they must agree"
            )
        if self.test_images.dtype != self.train_images.dtype:
            raise ValueError(
                f"test_images has dtype {self.test_images.dtype}; "
                f"train_images has {self.train_images.dtype}, and they must agree"
            )
        counts = torch.bincount(
            self.train_labels[self._rows_to_train_on()], minlength=self.num_classes
        )
        absent = [self.class_names[index] for index in torch.nonzero(counts == 0).flatten()]
        if absent:
            shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
            raise ValueError(
                f"train_labels has no image of {len(absent)} of the {self.num_classes} classes "
                f"({shown}); every class needs a training image"
            )
        warn_of_degenerate(self.name, self.train_images, self.num_classes)
        warn_of_twins(self.name, self.class_names)
        warn_of_few(f"the test set of {self.name}", self.test_labels, self.class_names)
        if self.validation_rows is not None:
            rows = self.train_labels[self.validation_rows]
            warn_of_few(f"the validation split of {self.name}", rows, self.class_names)

    def _check_part(self, part: str, images: Tensor, labels: Tensor) -> None:
        check_images(f"{part}_images", images)
        check_labels(f"{part}_labels", labels, len(images), self.num_classes)

    def __repr__(self) -> str:
        return (
            f"ImageDataset({self.name!r}: {len(self.train_labels)} training and "
            f"{len(self.test_labels)} test images of shape {self.image_shape}, "
            f"{self.num_classes} classes, {self.train_images.dtype})"
        )

    def classes_with_counts(self, most: int = 20) -> str:
        """How many training and test images each class has, for people; of many classes a range."""
        trained, tested = (
            torch.bincount(labels, minlength=self.num_classes).tolist()
            for labels in (self.train_labels, self.test_labels)
        )
        if self.num_classes <= most:
            each = zip(self.class_names, trained, tested, strict=True)
            counts = ", ".join(f"{name} {ours} + {others}" for name, ours, others in each)
            return f"{self.num_classes} classes (training + test images): {counts}"
        ranges = [
            f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            for counts in (trained, tested)
        ]
        return f"{self.num_classes} classes of {ranges[0]} training and {ranges[1]} test images"

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def split_validation(self, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
        """The dataset's own validation split, or a part of the training set, stratified by class.

        Args:
            fraction: Share of the training set to hold out, in (0, 1), where it has none.
            seed: The same seed gives the same split.

        Returns:
            (training indices, validation indices) into `train_images`, int64, ascending.

        Raises:
            ValueError: `fraction` is outside (0, 1), or the set is too small for it.
        """
        if self.validation_rows is not None:
            check_number("validation_fraction", fraction, above=0, below=1)
            return self._rows_to_train_on(), self.validation_rows
        return stratified_split(
            self.train_labels, fraction, seed, "validation_fraction", self.class_names
        )

    def _rows_to_train_on(self) -> Tensor:
        everything = torch.arange(len(self.train_labels))
        if self.validation_rows is None:
            return everything
        return everything[~torch.isin(everything, self.validation_rows)]


def stratified_split(
    labels: Tensor,
    fraction: float,
    seed: int,
    parameter: str,
    class_names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Split indices in two parts with the class proportions of `labels`.

    Args:
        labels: int64 [N].
        fraction: Share of the second part, in (0, 1).
        seed: The same seed gives the same split.
        parameter: Name of the caller's fraction argument, for error messages.
        class_names: For them, too; default: the labels.

    Returns:
        The indices of the first and of the second part, each int64 and ascending. Every class is
        present in the first part.

    Raises:
        ValueError: `fraction` is outside (0, 1), `seed` is no integer, or the data is too small
            to give such a split.
    """
    check_number(parameter, fraction, above=0, below=1)
    # Without one, each load would have another test set.
    check_integer("seed", seed, 0, LARGEST_SEED)
    targets = labels.cpu().numpy()
    found, counts = np.unique(targets, return_counts=True)

    def name(label: int) -> str:
        return str(label) if class_names is None else class_names[label]

    described = (
        f"{parameter} = {fraction} cannot split {len(targets)} images of {len(found)} classes"
    )
    if not len(found) or counts.min() < 2:
        few = f"class {name(found[counts.argmin()])} has one" if len(found) else "there are none"
        raise ValueError(f"{described}: every class needs two, and {few}")
    held = math.ceil(fraction * len(targets))
    for part, size, remedy in (
        ("hold out", held, "larger"),
        ("keep", len(targets) - held, "smaller"),
    ):
        if size < len(found):
            raise ValueError(
                f"{described}: it would {part} {size}, and every class needs one; use a {remedy} "
                "fraction, or more images"
            )
    kept, held_out = train_test_split(
        np.arange(len(targets)),
        test_size=held,
        random_state=seed % 2**32,  # NumPy's generators take no larger one
        stratify=targets,
    )
    # scikit-learn balances the two parts, and may leave nothing of a rare class in the first one.
    missing = np.setdiff1d(targets, targets[kept])
    if missing.size:
        raise ValueError(
            f"{parameter} = {fraction} leaves no image of class {name(missing[0])} to train "
            "on; use a smaller fraction"
        )
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held_out))


def fingerprint(dataset: ImageDataset) -> str:
    """A checksum of the training data: of all labels, and of so many images spread over all."""
    stride = -(-len(dataset.train_images) // FINGERPRINT_IMAGES)
    return checksum([dataset.train_images[::stride], dataset.train_labels])[:16]
