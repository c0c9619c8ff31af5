"""Channels of 16 bits: which value is white in them, and the lower half that Pillow leaves out."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: What white can be in 8, 10, 12, 14 or 16 bits.
WHITES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)
#: Of colour pictures Pillow keeps the byte that it takes for the upper one. Told that the bytes are
#: in the other order, it keeps the lower one.
_NATIVE, _OTHER = ("L", "B") if sys.byteorder == "little" else ("B", "L")
_SWAPPED = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in ((_NATIVE, _OTHER), (_OTHER, _NATIVE), ("N", _OTHER))
}


def eight_bits(pixels: NDArray[Any], white: int | None = None) -> NDArray[np.uint8]:
    """Integers of up to 16 bits as uint8.

    Args:
        pixels: Integers in [0, 2^16), any shape.
        white: The value of white, one of `WHITES`; default: the least of 255, 4095 and 65535 that
            none exceeds. So the 12 bits that many cameras and scanners store in 16 fill the range.

    Raises:
        ValueError: A pixel exceeds `white`.
    """
    highest = int(pixels.max())
    if white is None:
        white = narrowest_white(highest)
    if highest > white:
        raise ValueError(f"its pixels go up to {highest}, more than white = {white}")
    return (pixels // ((white + 1) // 256)).astype(np.uint8)


def narrowest_white(highest: int) -> int:
    """The least of 255, 4095 and 65535 that the highest pixel does not exceed."""
    return next(white for white in (2**8 - 1, 2**12 - 1, 2**16 - 1) if highest <= white)


def is_deep_colour(file: Image.Image) -> bool:
    """Whether a file that was just opened has colours, with or without opacity, of 16 bits each."""
    return bool(_swapped(file))


def deep_colours(file: Image.Image, again: Image.Image) -> NDArray[np.uint16]:
    """The pixels of a picture for which `is_deep_colour` holds, [H, W, 3 or 4].

    Args:
        file: The picture, just opened.
        again: The same, opened a second time.
    """
    again.tile = _swapped(again)  # type: ignore[attr-defined]
    upper, lower = np.asarray(file).astype(np.uint16), np.asarray(again)
    return upper * 256 + lower


def _swapped(file: Image.Image) -> list[Any]:
    """How Pillow reads the file's parts, with bytes in the other order; empty if it has 8 bits."""
    parts = []
    for part in getattr(file, "tile", []):
        arguments = part.args if isinstance(part.args, tuple) else (part.args,)
        if arguments[0] not in _SWAPPED:
            return []
        swapped = (_SWAPPED[arguments[0]], *arguments[1:])
        parts.append(part._replace(args=swapped if isinstance(part.args, tuple) else swapped[0]))
    return parts
