"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from bilevel.checks import check_integer
from dd.data.image_dataset import ImageDataset, stratified_split
from dd.runtime.sizes import LARGEST_SEED


def digits(test_fraction: float = 0.2, seed: int = 0) -> ImageDataset:
    """1,797 handwritten digits [1, 8, 8], float32 in [0, 1], 10 classes.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", 1998, as shipped
    with scikit-learn; the original values 0 … 16 are divided by 16.

    Args:
        test_fraction: Share held out as test set, stratified by class, in (0, 1).
        seed: The same seed gives the same split.

    Raises:
        ValueError: `test_fraction` is outside (0, 1) or leaves a part without some class, or
            `seed` is outside [0, 2**63).
    """
    check_integer("seed", seed, 0, LARGEST_SEED)
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32).div_(16).unsqueeze(1)
    labels = torch.from_numpy(data.target).to(torch.int64)
    train, test = stratified_split(labels, test_fraction, seed, "test_fraction")
    return ImageDataset(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        class_names=tuple(str(name) for name in data.target_names),
    )
