"""Distilled sets that others made: a `.pt` or `.npz` file, or a folder of images."""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dd.data import ImageDataset, PixelTransform, apply_in_chunks
from dd.data.checks import check_finite, check_images, check_shape, warn_of_degenerate
from dd.data.pictures import decode_image, survey
from dd.data.sources.array_forms import CLASS_NAMES, Array, as_classes, as_pixels, find_part
from dd.data.sources.arrays import read_npz
from dd.data.sources.image_files import list_class_folders
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.names import PIXELS
from dd.runtime.files import DamagedFileError

_log = logging.getLogger(__name__)


def load_foreign_set(
    path: Path, dataset: ImageDataset, transform: PixelTransform, values: str
) -> DistilledSet:
    """A set for a dataset, from a `.pt` file, an `.npz` file or a folder.

    A `.pt` file holds a dict with `images` [N, C, H, W] and, optionally, `labels` ([N], [N, 1] or
    [N, K]), or a pair of the two, or images alone; without labels the images are ordered by class,
    as many of each. It is read without running anything that it contains. An `.npz` file holds
    arrays of the names and in the forms that `dd.data.arrays` takes, or soft labels [N, K]. A
    folder holds one sub-folder of image files for each class, called as the dataset calls them. Of
    greyscale [N, H, W] will do, and channels may be last.

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
    labels: Tensor | None
    if path.is_dir():
        images, labels = _from_folder(path, dataset)
    elif path.suffix.lower() == ".npz":
        images, labels = _from_arrays(path, dataset, values)
    else:
        images, labels = _from_tensors(path)
    classes = dataset.num_classes
    images = _channels_first(images, dataset.image_shape)
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


def _channels_first(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [N, H, W, C] or, of one channel, [N, H, W] as [N, C, H, W] of this shape."""
    channels, height, width = shape
    if channels == 1 and tuple(images.shape[1:]) == (height, width):
        return images[:, None]
    last = tuple(images.shape[1:]) == (height, width, channels) != shape
    return images.movedim(3, 1) if last else images


def _one_a_row(labels: Tensor, classes: int) -> Tensor:
    """Labels [N, 1] as [N], whole numbers in floating point and one-hot ones as integers."""
    if labels.dim() == 2 and labels.shape[1] == 1 != classes:
        labels = labels[:, 0]
    if labels.dim() == 2 and not labels.is_floating_point():
        one_hot = labels.ne(0).sum(dim=1).eq(1).all() and labels.sum(dim=1).eq(1).all()
        return labels.long().argmax(dim=1) if bool(one_hot) else labels
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


def _from_arrays(path: Path, dataset: ImageDataset, values: str) -> tuple[Tensor, Tensor | None]:
    content = read_npz(path)
    names = content.pop(CLASS_NAMES, None)
    try:
        found = find_part(content, "train")
        images = content[found[0]]
        if values == PIXELS:
            pixels = as_pixels({found[0]: images}, None, None)[found[0]]
        elif images.dtype.kind not in "buif":
            raise ValueError(f"{found[0]} has dtype {images.dtype}; it must be numbers")
        else:
            pixels = torch.from_numpy(images.astype(np.float32))
        if found[1] is None:
            return pixels, None
        labels = content[found[1]]
        if labels.dtype.kind == "f" and labels.shape[1:] == (dataset.num_classes,) != (1,):
            return pixels, torch.from_numpy(labels.astype(np.float32))
        return pixels, _by_name(as_classes(found[1], labels)[0], names, dataset.class_names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _by_name(labels: Array, given: Array | None, class_names: Sequence[str]) -> Tensor:
    """Labels, numbers or strings, as numbers of the dataset's classes."""
    if given is not None and sorted(map(str, given)) != sorted(class_names):
        raise ValueError(
            f"its classes are {list(map(str, given))[:3]} …; they must be {list(class_names)[:3]} …"
        )
    if labels.dtype.kind != "U":
        if given is None or not len(labels) or not 0 <= labels.min() <= labels.max() < len(given):
            return torch.from_numpy(labels)  # whether they lie in the range is checked later
        labels = np.asarray(given).astype(str)[labels]
    number = {name: index for index, name in enumerate(class_names)}
    unknown = sorted(set(labels.tolist()) - number.keys())
    if unknown:
        raise ValueError(f"there is no class {unknown[0]!r}; there are {list(class_names)[:3]} …")
    return torch.tensor([number[label] for label in labels.tolist()])


def _from_folder(path: Path, dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    channels, size, _ = dataset.image_shape
    paths, labels, names = list_class_folders(path, path, "<class>/<image files>")
    if set(names) != set(dataset.class_names):
        raise ValueError(
            f"{path} has folders {list(names)[:3]} …; they must be the classes "
            f"{list(dataset.class_names)[:3]} …"
        )
    label_of = torch.tensor([dataset.class_names.index(name) for name in names])
    white = survey(paths)
    images = torch.stack([decode_image(each, size, channels, white=white) for each in paths])
    return images, label_of[labels]
