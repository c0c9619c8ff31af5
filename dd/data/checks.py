"""What images and labels must be, through whichever door they come."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

#: A test set of fewer images is warned of.
LEAST_JUDGED = 50
#: Images whose highest pixel is below this share of white are warned of.
DARK = 1 / 14
_log = logging.getLogger(__name__)


def check_images(name: str, images: Tensor) -> None:
    """Pixels: uint8, or float32 in [0, 1], [N, C, H, W].

    Raises:
        ValueError: They are not, or there are none; the message begins with `name`.
    """
    check_shape(name, images)
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            f"{name} has dtype {images.dtype}; allowed are torch.uint8 and torch.float32 in [0, 1]"
        )
    if images.dtype == torch.float32:
        check_unit_range(name, images)


def check_shape(name: str, images: Tensor) -> None:
    """Raise `ValueError` unless there are images, [N, C, H, W]."""
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}; it must be [N, C, H, W] and not empty"
        )


def check_unit_range(name: str, images: Tensor) -> None:
    """Raise `ValueError` unless all values lie in [0, 1]."""
    if images.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    # aminmax propagates NaN, for which this comparison is false.
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"{name} has values from {low} to {high}; floating point images must lie in [0, 1] "
            "(divide by 255?)"
        )


def check_finite(name: str, values: Tensor) -> None:
    """Raise `ValueError` if a value is NaN or infinite."""
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} has {int(wrong.sum())} values of {values.numel()} that are NaN or infinite"
        )


def check_labels(name: str, labels: Tensor, count: int, num_classes: int) -> None:
    """Hard labels: int64 [count], in [0, num_classes).

    Raises:
        ValueError: They are not; the message begins with `name`.
    """
    if labels.shape != (count,):
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; for these images it must be ({count},)"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {labels.dtype}; it must be torch.int64")
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name} has labels from {low} to {high}; with {num_classes} "
            f"class_names they must lie in [0, {num_classes - 1}]"
        )


def warn_of_degenerate(name: str, images: Tensor, num_classes: int) -> None:
    """Log a warning for what can be trained on, but teaches little: one class, one grey, night."""
    if num_classes == 1:
        _log.warning("warning: %s has one class, so any network is right about all of it", name)
    # A look at some is enough: the images may be more than fit in memory.
    some = images[:: max(1, len(images) // 256)].flatten(1)
    constant = int((some.amax(1) == some.amin(1)).sum())
    if 2 * constant > len(some):
        _log.warning(
            "warning: %d of %d images of %s that were looked at are of one colour throughout",
            constant,
            len(some),
            name,
        )
    highest = float(some.max()) / (255 if some.dtype == torch.uint8 else 1)
    if 0 < highest < DARK:
        _log.warning(
            "warning: no pixel of %d images of %s that were looked at exceeds %.2g, where white is "
            "1: were they divided by 255 twice, or is another value white?",
            len(some),
            name,
            highest,
        )


def warn_of_twins(name: str, class_names: Sequence[str]) -> None:
    """Log a warning for classes whose names differ in nothing, or in case and spaces alone."""
    groups: dict[str, list[str]] = {}
    for class_name in class_names:
        groups.setdefault("".join(class_name.split()).casefold(), []).append(class_name)
    twins = [group for group in groups.values() if len(group) > 1]
    if twins:
        _log.warning(
            "warning: %s has %d classes whose names say the same: %s",
            name,
            sum(map(len, twins)),
            ", ".join(map(repr, twins[0])) + (", …" if len(twins) > 1 else ""),
        )


def warn_of_few(name: str, labels: Tensor, class_names: Sequence[str]) -> None:
    """Log a warning for a part that is judged on, and tells little: few images, absent classes.

    Args:
        name: Of the part.
        labels: int64 [N].
        class_names: K names.
    """
    if len(labels) < LEAST_JUDGED:
        _log.warning(
            "warning: %s has %d images, so each counts for %.1f %% of the accuracy",
            name,
            len(labels),
            100 / len(labels),
        )
    counts = torch.bincount(labels, minlength=len(class_names))
    absent = [class_names[index] for index in (counts == 0).nonzero().flatten().tolist()]
    if absent:
        _log.warning(
            "warning: %s has no image of %d of the %d classes (%s)",
            name,
            len(absent),
            len(class_names),
            ", ".join(absent[:5]) + (", …" if len(absent) > 5 else ""),
        )
