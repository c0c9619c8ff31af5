"""Rebuilding a transform from a saved artifact."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dd.data.transforms.base import PixelTransform


def _kinds(transform: type[PixelTransform] = PixelTransform) -> dict[str, type[PixelTransform]]:
    """Every transform that is defined, one's own among them, by its kind."""
    found = {transform.kind: transform} if hasattr(transform, "kind") else {}
    for derived in transform.__subclasses__():
        found |= _kinds(derived)
    return found


def transform_from_state(kind: str, state: Mapping[str, Tensor]) -> PixelTransform:
    """Rebuild a fitted transform, bit for bit.

    Args:
        kind: The transform's `kind`.
        state: What its `state()` returned.

    Raises:
        ValueError: `kind` is unknown, or a tensor is missing, unknown, or has a wrong shape
            or dtype.
    """
    kinds = _kinds()
    if kind not in kinds:
        raise ValueError(
            f"kind is {kind!r}; allowed are {', '.join(map(repr, sorted(kinds)))}, and those of a "
            "module of your own once it is imported (--import MODULE)"
        )
    return kinds[kind].from_state(state)
