"""A user's own images from an ``.npz`` file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dd.data.image_dataset import DatasetNotFoundError, ImageDataset, stratified_split
from dd.runtime.changes import Judging

__all__ = ["arrays"]

_CHANNEL_COUNTS = (1, 3)
_REQUIRED = ("images", "labels")
_OPTIONAL = ("test_images", "test_labels", "class_names")


def arrays(path: Judging[str | Path], test_fraction: float = 0.1, seed: int = 0) -> ImageDataset:
    """Images and labels from an ``.npz`` file, as written by ``numpy.savez``.

    The file holds

    - ``images``: [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, uint8, or floating
      point in [0, 1];
    - ``labels``: integers [N], 0 … K−1;
    - optionally ``test_images`` and ``test_labels``, in the same form; without them a stratified
      part of the images becomes the test set;
    - optionally ``class_names``: strings [K].

    Args:
        path: the file; its stem becomes the dataset's name.
        test_fraction: share held out as test set if the file has none, in (0, 1).
        seed: the same seed gives the same split.

    Raises:
        DatasetNotFoundError: if there is no such file.
        ValueError: if the file is damaged, pickled or incomplete, or its contents do not make a
            dataset; the message names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetNotFoundError.looked_in(
            path.parent, f"the file {path.name}", "write it with numpy.savez, or correct path"
        )
    content = _read(path)
    try:
        return _build(path.stem, content, test_fraction, seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with archive:
                return {key: archive[key] for key in (*_REQUIRED, *_OPTIONAL) if key in archive}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as an .npz file of plain arrays (object arrays and pickles "
            f"are refused): {error}"
        ) from error


def _build(
    name: str, content: dict[str, NDArray[np.generic]], test_fraction: float, seed: int
) -> ImageDataset:
    for key in _REQUIRED:
        if key not in content:
            raise ValueError(f"the array {key!r} is missing; images and labels are required")
    if ("test_images" in content) != ("test_labels" in content):
        missing = "test_labels" if "test_images" in content else "test_images"
        raise ValueError(f"the array {missing!r} is missing; give both test arrays or neither")

    images = _images("images", content["images"])
    labels = _labels("labels", content["labels"])
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; "
            f"for {images.shape[0]} images it must be ({images.shape[0]},)"
        )
    class_names = _class_names(content.get("class_names"), labels)
    if "test_images" in content:
        test_images = _images("test_images", content["test_images"])
        test_labels = _labels("test_labels", content["test_labels"])
    else:
        train, test = stratified_split(labels, test_fraction, seed, "test_fraction")
        test_images, test_labels = images[test], labels[test]
        images, labels = images[train], labels[train]
    return ImageDataset(name, images, labels, test_images, test_labels, class_names)


def _images(name: str, array: NDArray[np.generic]) -> Tensor:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(
            f"{name} has dtype {array.dtype}; allowed are uint8 and floating point in [0, 1]"
        )
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
    if array.ndim == 3:
        array = array[:, None]
    elif _channel_axis(name, array.shape) == 3:
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array))


def _channel_axis(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 4:
        raise ValueError(
            f"{name} has shape {shape}; allowed are [N, H, W], [N, H, W, C] and [N, C, H, W]"
        )
    candidates = [axis for axis in (1, 3) if shape[axis] in _CHANNEL_COUNTS]
    if len(candidates) == 1:
        return candidates[0]
    problem = "both have" if candidates else "neither has"
    raise ValueError(
        f"{name} has shape {shape}; the channels must be on axis 1 or axis 3, whichever has size "
        f"1 or 3, but {problem} such a size"
    )


def _labels(name: str, array: NDArray[np.generic]) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} has dtype {array.dtype} and shape {array.shape}; it must be integers [N]"
        )
    return torch.from_numpy(array.astype(np.int64))


def _class_names(array: NDArray[np.generic] | None, labels: Tensor) -> tuple[str, ...]:
    if array is not None:
        if array.dtype.kind != "U" or array.ndim != 1:
            raise ValueError(
                f"class_names has dtype {array.dtype} and shape {array.shape}; "
                "it must be strings [number of classes]"
            )
        return tuple(str(name) for name in array)
    highest = int(labels.max())
    # Checked before the names are made: a stray label must not allocate that many of them.
    if highest >= len(labels):
        raise ValueError(
            f"labels goes up to {highest} with {len(labels)} images; labels must be 0 … K−1 and "
            "every class needs a training image"
        )
    return tuple(str(label) for label in range(highest + 1))
