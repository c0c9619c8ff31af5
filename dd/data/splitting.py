"""Stratified splits of labelled data."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["stratified_split"]


def stratified_split(
    labels: Tensor, fraction: float, seed: int, parameter: str
) -> tuple[Tensor, Tensor]:
    """Split indices in two parts with the class proportions of ``labels``.

    Args:
        labels: int64 [N].
        fraction: share of the second part, in (0, 1).
        seed: the same seed gives the same split.
        parameter: name of the caller's fraction argument, for error messages.

    Returns:
        The indices of the first and of the second part, each int64 and ascending. Every class is
        present in the first part.

    Raises:
        ValueError: if ``fraction`` is outside (0, 1), or the data is too small to give such a
            split.
    """
    if not (isinstance(fraction, (int, float)) and 0.0 < fraction < 1.0):
        raise ValueError(f"{parameter} is {fraction!r}; it must lie strictly between 0 and 1")
    targets = labels.cpu().numpy()
    try:
        kept, held_out = train_test_split(
            np.arange(len(targets)), test_size=fraction, random_state=seed, stratify=targets
        )
    except ValueError as error:
        raise ValueError(
            f"{parameter} = {fraction} cannot split {len(targets)} images of "
            f"{len(np.unique(targets))} classes: {error}"
        ) from error
    # scikit-learn balances the two parts, and may leave nothing of a rare class in the first one.
    missing = np.setdiff1d(targets, targets[kept])
    if missing.size:
        raise ValueError(
            f"{parameter} = {fraction} leaves no image of class {missing[0]} to train on; "
            "use a smaller fraction"
        )
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held_out))
