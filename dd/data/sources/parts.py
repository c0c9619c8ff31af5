"""A dataset from its parts: the splits put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dd.data.image_dataset import ImageDataset, stratified_split


def assembled(
    name: str,
    images: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    class_names: Sequence[str],
    test_fraction: float,
    seed: int,
) -> ImageDataset:
    """A dataset from the parts "train" and, if they are there, "test" and "validation".

    Args:
        name: Of the dataset.
        images: Of each part, [N, C, H, W].
        labels: Of each part, int64 [N].
        class_names: K names.
        test_fraction: Share of "train" that is held out where there is no "test".
        seed: Of that.

    Raises:
        ValueError: They make no dataset.
    """
    images, labels, rows = dict(images), dict(labels), None
    if "test" not in images:
        train, test = stratified_split(
            labels["train"], test_fraction, seed, "test_fraction", class_names
        )
        for each in (images, labels):
            each["test"], each["train"] = each["train"][test], each["train"][train]
    if "validation" in images:
        count = len(images["train"])
        rows = torch.arange(count, count + len(images["validation"]))
        for each in (images, labels):
            each["train"] = torch.cat([each["train"], each["validation"]])
    names = tuple(class_names)
    return ImageDataset(
        name, images["train"], labels["train"], images["test"], labels["test"], names, rows
    )
