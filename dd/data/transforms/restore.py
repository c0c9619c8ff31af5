"""Rebuilding a transform from a saved artifact."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dd.data.transforms.base import PixelTransform
from dd.data.transforms.kip import KIPWhitening
from dd.data.transforms.standardize import Standardize
from dd.data.transforms.zca import ZCAWhitening

_KINDS: dict[str, type[PixelTransform]] = {
    transform.kind: transform for transform in (KIPWhitening, Standardize, ZCAWhitening)
}


def transform_from_state(kind: str, state: Mapping[str, Tensor]) -> PixelTransform:
    """Rebuild a fitted transform, bit for bit.

    Args:
        kind: The transform's `kind`.
        state: What its `state()` returned.

    Raises:
        ValueError: `kind` is unknown, or a tensor is missing, unknown, or has a wrong shape
            or dtype.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(map(repr, sorted(_KINDS)))}")
    return _KINDS[kind].from_state(state)
