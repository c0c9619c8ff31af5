"""Rebuilding a transform from a saved artifact."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dd.data.transforms.base import PixelTransform
from dd.data.transforms.kip import KIPWhitening
from dd.data.transforms.standardize import Standardize
from dd.data.transforms.zca import ZCAWhitening

__all__ = ["transform_from_state"]

_KINDS: dict[str, type[PixelTransform]] = {
    transform.kind: transform for transform in (KIPWhitening, Standardize, ZCAWhitening)
}


def transform_from_state(kind: str, state: Mapping[str, Tensor]) -> PixelTransform:
    """Rebuild a fitted transform, bit for bit.

    Args:
        kind: the transform's ``kind``.
        state: what its ``state()`` returned.

    Raises:
        ValueError: if ``kind`` is unknown, or a tensor is missing, unknown, or has a wrong shape
            or dtype.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(map(repr, sorted(_KINDS)))}")
    return _KINDS[kind].from_state(state)
