"""Distilled sets that others made: tensors in a `.pt` file, or a folder of images."""

import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor

from dd.data import ImageDataset, PixelTransform, apply_in_chunks
from dd.data.checks import check_finite, check_images, check_shape, warn_of_degenerate
from dd.data.pictures import decode_image
from dd.data.sources.image_files import list_class_folders
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.names import PIXELS
from dd.runtime.files import DamagedFileError

_log = logging.getLogger(__name__)


def load_foreign_set(
    path: Path, dataset: ImageDataset, transform: PixelTransform, values: str
) -> DistilledSet:
    """A set for a dataset, from a `.pt` file or a folder.

    A `.pt` file holds a dict with `images` [N, C, H, W] and, optionally, `labels` ([N], [N, 1] or
    [N, K]), or a pair of the two, or images alone; without labels the images are ordered by class,
    as many of each. It is read without running anything that it contains. A folder holds one
    sub-folder of image files for each class, called as the dataset calls them.

    Args:
        path: The file or folder.
        dataset: What the set was distilled from.
        transform: Fitted on it.
        values: "pixels", in [0, 1] or uint8, to which the transform is applied; or "transformed",
            as the networks see them. A folder holds pixels.

    Raises:
        DamagedFileError: The file holds something else; nothing in it was run.
        ValueError: The shapes do not fit the dataset.
    """
    images, labels = _from_folder(path, dataset) if path.is_dir() else _from_tensors(path)
    classes = dataset.num_classes
    if images.dim() != 4 or tuple(images.shape[1:]) != dataset.image_shape:
        raise ValueError(
            f"{path} holds images of shape {tuple(images.shape)}; {dataset.name} has "
            f"{dataset.image_shape}"
        )
    _check_values(path, images, values)
    if labels is None:
        if len(images) % classes:
            raise ValueError(
                f"{path} holds {len(images)} images without labels; {dataset.name} has {classes} "
                "classes, and they must be as many of each"
            )
        labels = torch.arange(classes).repeat_interleave(len(images) // classes)
    labels = _one_a_row(labels, classes)
    hard = labels.dim() == 1 and not labels.is_floating_point()
    soft = labels.is_floating_point() and labels.shape[1:] == (classes,)
    if len(labels) != len(images) or not (hard or soft):
        raise ValueError(
            f"{path} holds {labels.dtype} labels of shape {tuple(labels.shape)}; they must be "
            f"integers [{len(images)}], or floating point [{len(images)}, {classes}]"
        )
    if hard and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"{path} holds labels outside 0 … {classes - 1}")
    if soft:
        check_finite(f"labels of {path}", labels)
    warn_of_degenerate(path.name, images, classes)
    present = len(labels.unique())
    if hard and present < classes:
        _log.warning("warning: %s has images of %d of the %d classes", path.name, present, classes)
    if values == PIXELS or path.is_dir():
        images = apply_in_chunks(transform, images)
    return DistilledSet(
        images=images.float(),
        labels=labels.float() if soft else labels.long(),
        transform=transform,
        class_names=dataset.class_names,
        provenance={"foreign": path.name},
    )


def _one_a_row(labels: Tensor, classes: int) -> Tensor:
    """Labels [N, 1] as [N], and whole numbers in floating point as integers."""
    if labels.dim() == 2 and labels.shape[1] == 1 != classes:
        labels = labels[:, 0]
    is_float_list = labels.dim() == 1 and labels.is_floating_point()
    # NaN and infinity are no whole numbers: their remainder is NaN.
    return labels.long() if is_float_list and bool((labels % 1 == 0).all()) else labels


def _check_values(path: Path, images: Tensor, values: str) -> None:
    name = f"images of {path}"
    check_shape(name, images)
    if values == PIXELS or path.is_dir():
        to_pixels = images if images.dtype == torch.uint8 else images.float()
        check_images(name, to_pixels)
    else:
        check_finite(name, images)


def _from_tensors(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "unreadable"
        raise DamagedFileError(
            f"{path} holds more than tensors, or is damaged: {reason}"
        ) from error
    if isinstance(found, dict):
        images, labels = found.get("images"), found.get("labels")
    elif isinstance(found, (list, tuple)) and len(found) == 2:
        images, labels = found
    else:
        images, labels = found, None
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor | None):
        raise DamagedFileError(
            f"{path} must hold a dict with tensors images and labels, a pair of them, or images"
        )
    return images.detach(), None if labels is None else labels.detach()


def _from_folder(path: Path, dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    channels, size, _ = dataset.image_shape
    paths, labels, names = list_class_folders(path, path, "<class>/<image files>")
    if set(names) != set(dataset.class_names):
        raise ValueError(
            f"{path} has folders {list(names)[:3]} …; they must be the classes "
            f"{list(dataset.class_names)[:3]} …"
        )
    label_of = torch.tensor([dataset.class_names.index(name) for name in names])
    images = torch.stack([decode_image(picture, size, channels) for picture in paths])
    return images, label_of[labels]
