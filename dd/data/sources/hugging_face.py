"""A dataset of labelled pictures by the package `datasets`: from its hub, or from a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bilevel.checks import check_path, check_text
from dd.data.image_dataset import DatasetNotFoundError, ImageDataset
from dd.data.sources.named import Reading

_SPLITS = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev"),
}
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "target", "class")
#: What `datasets` writes into a folder that it saves.
_SAVED = ("dataset_dict.json", "state.json")
_log = logging.getLogger(__name__)


def hugging_face(
    path: str,
    configuration: str | None = None,
    image: str | None = None,
    label: str | None = None,
    image_size: int | None = None,
    fit: str = "crop",
    background: str = "white",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """A dataset of the Hugging Face hub, or one that `save_to_disk` wrote.

    It needs the package `datasets` (`pip install 'bilevel-dd[datasets]'`). Splits are used by their
    names; what has a validation split but no test set is tested on that, and without both a
    stratified part of the training images becomes the test set. A split without labels, all -1, is
    left out.

    Args:
        path: Its name there, such as "ylecun/mnist", or a folder.
        configuration: Of a dataset that has several.
        image: The column of pictures; default: the only one.
        label: The column of labels, such as "fine_label"; default: the only one.
        image_size: Height and width of the result; default: as they are, if all are of one size.
        fit: How a picture becomes square: "crop" keeps the centre, "pad" keeps all of it.
        background: The colour under transparent pixels, and around pictures that are padded.
        test_fraction: Share held out as test set if there is none, in (0, 1).
        seed: The same seed gives the same split.

    Raises:
        DatasetNotFoundError: It cannot be loaded.
        ValueError: The package is missing, or its columns make no dataset.
    """
    reading = Reading("hugging_face", image_size, fit, background, test_fraction, seed)
    check_path("path", path)
    for name, text in (("configuration", configuration), ("image", image), ("label", label)):
        if text is not None:
            check_text(name, text)
    loaded = _loaded(str(path), configuration)
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    parts = {
        part: next((splits[name] for name in names if name in splits), None)
        for part, names in _SPLITS.items()
    }
    if parts["train"] is None:
        raise ValueError(f"{path} has no split 'train'; it has {', '.join(splits) or 'none'}")
    features = parts["train"].features
    columns = (
        _column(features, image, "image", "Image", _IMAGES),
        _column(features, label, "label", "ClassLabel", _LABELS),
    )
    images, labels = {}, {}
    for part, rows in parts.items():
        if rows is None:
            continue
        described = f"{part} images of {path}"
        pairs = (tuple(row[column] for column in columns) for row in rows)
        pixels, found = reading.gathered(pairs, described)
        if part != "train" and all(each in (-1, None) for each in found):
            _log.warning("note: the %s have no labels, and are left out", described)
            continue
        images[part], labels[part] = pixels, found
    names = getattr(features[columns[1]], "names", None)
    values = range(len(names)) if names else sorted(set(labels["train"]))
    numbers = {part: _numbered(found, values, part) for part, found in labels.items()}
    class_names = names or [str(value) for value in values]
    return reading.dataset(Path(path).name, images, numbers, class_names)


def _loaded(path: str, configuration: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "hugging_face needs the package datasets: pip install 'bilevel-dd[datasets]'"
        ) from error
    try:
        if any((Path(path) / name).is_file() for name in _SAVED):
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, configuration)
    # Whatever it is: its own errors, those of the network, and those of the files.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetNotFoundError(f"datasets cannot load {path!r}: {reason}") from error


def _column(
    features: Mapping[str, Any], chosen: str | None, parameter: str, kind: str, names: Sequence[str]
) -> str:
    """The column that is asked for, the only one of its kind, or the only one called so."""
    if chosen is not None:
        if chosen not in features:
            raise ValueError(f"{parameter}={chosen!r}: the columns are {', '.join(features)}")
        return chosen
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    found = of_kind or [name for name in features if name.lower() in names]
    if len(found) != 1:
        raise ValueError(
            f"the columns are {', '.join(features)}: say which one is it, hugging_face.{parameter}"
        )
    return found[0]


def _numbered(labels: Sequence[Any], values: Sequence[Any], part: str) -> torch.Tensor:
    """int64 [N]: where each label is among those of the classes."""
    number = {value: index for index, value in enumerate(values)}
    unknown = [label for label in labels if label not in number]
    if unknown:
        raise ValueError(f"the {part} images have the class {unknown[0]!r}, which is none of train")
    return torch.tensor([number[label] for label in labels])
