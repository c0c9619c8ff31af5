"""The forms in which people keep images and labels in arrays, made into one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dd.data.sixteen_bits import eight_bits, narrowest_white

Array = NDArray[Any]

CLASS_NAMES = "class_names"
_CHANNEL_COUNTS = (1, 3)
_PREFIXES = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("val", "valid", "validation"),
}
_log = logging.getLogger(__name__)


def _name_pairs(part: str) -> list[tuple[str, str]]:
    """What the images and the labels of "train", "test" or "validation" may be called."""
    pairs = [("images", "labels"), ("x", "y")] if part == "train" else []
    for prefix in _PREFIXES[part]:
        pairs += [(f"{prefix}_images", f"{prefix}_labels"), (f"x_{prefix}", f"y_{prefix}")]
        pairs += [(f"{prefix}_x", f"{prefix}_y")]
    return pairs


def is_known(name: str) -> bool:
    """Whether an array of this name is read."""
    known = {name for part in _PREFIXES for pair in _name_pairs(part) for name in pair}
    return name == CLASS_NAMES or name.lower() in known


def find_part(names: Iterable[str], part: str) -> tuple[str, str | None]:
    """The names of the images of a part, and of its labels if there are any.

    Raises:
        ValueError: There are no images, or two arrays could be meant.
    """
    spelled = _spelled(names)
    found = _find(spelled, part)
    if found is None or found[0] not in spelled:
        raise ValueError(f"the array 'images' is missing; it holds {sorted(spelled.values())}")
    return spelled[found[0]], spelled.get(found[1])


def find_parts(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """From each part that is there to the names of its images and labels; case does not matter.

    Raises:
        ValueError: An array is missing, or two could be meant.
    """
    spelled = _spelled(names)
    parts = {}
    for part in _PREFIXES:
        pair = _find(spelled, part)
        if pair is None:
            continue
        missing = [name for name in pair if name not in spelled]
        if missing:
            raise ValueError(
                f"the array {missing[0]!r} is missing; {pair[0]} and {pair[1]} belong together, "
                f"and it holds {sorted(spelled.values())}"
            )
        parts[part] = spelled[pair[0]], spelled[pair[1]]
    if "train" not in parts:
        raise ValueError(
            "the array 'images' is missing; it must hold images and labels, or train_images and "
            f"train_labels, or x_train and y_train, and it holds {sorted(spelled.values())}"
        )
    return parts


def _spelled(names: Iterable[str]) -> dict[str, str]:
    """From names in lower case to how they are spelled."""
    spelled: dict[str, str] = {}
    for name in names:
        if spelled.setdefault(name.lower(), name) != name:
            raise ValueError(f"it holds both {spelled[name.lower()]!r} and {name!r}; keep one")
    return spelled


def _find(spelled: Mapping[str, str], part: str) -> tuple[str, str] | None:
    """The pair of names of a part of which at least one is there."""
    found = [pair for pair in _name_pairs(part) if any(name in spelled for name in pair)]
    if len(found) > 1:
        both = [next(spelled[name] for name in pair if name in spelled) for pair in found]
        raise ValueError(
            f"it holds both {both[0]!r} and {both[1]!r} for the {part} images; keep one"
        )
    return found[0] if found else None


def as_pixels(
    arrays: Mapping[str, Array], white: float | None, channels: str | None
) -> dict[str, Tensor]:
    """Images of several parts, uint8 or float32, [N, C, H, W] with 1 or 3 channels.

    Args:
        arrays: By name, [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, or with 4 of
            which the last is opacity; these are composited on white, and that is said.
        white: The value of white; None for 255 in uint8, 1 in floating point, and in other
            integers the least of 255, 4095 and 65535 that no part exceeds.
        channels: "first" or "last", where the shape does not tell.

    Raises:
        ValueError: They have another dtype or shape, or values outside [0, white].
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "buif":
            raise ValueError(
                f"{name} has dtype {array.dtype}; allowed are integers and floating point"
            )
    if white is None:
        white = _found_white(arrays)
    found = {}
    for name, array in arrays.items():
        pixels = _channels_first(name, _scaled(name, array, white), channels)
        if pixels.shape[1] == 4:
            _log.warning("note: the fourth channel of %s is taken for opacity, on white", name)
            pixels = _on_white(pixels)
        found[name] = torch.from_numpy(np.ascontiguousarray(pixels))
    return found


def _found_white(arrays: Mapping[str, Array]) -> float | None:
    """What is white in integers of more than a byte; None where the dtype says it."""
    dtypes = {array.dtype for array in arrays.values() if array.size}
    if all(dtype.kind in "bf" or dtype == np.uint8 for dtype in dtypes):
        return None
    if len(dtypes) > 1:
        raise ValueError(
            f"{', '.join(arrays)} have dtypes {', '.join(sorted(map(str, dtypes)))}; "
            "they must agree"
        )
    (dtype,) = dtypes
    highest = max(int(array.max()) for array in arrays.values() if array.size)
    name = next(iter(arrays))
    if not 1 < highest < 2**16:
        raise ValueError(
            f"{name} has dtype {dtype} and values up to {highest}; "
            "say which value is white: arrays.white = 255"
        )
    white = narrowest_white(highest)
    _log.warning("note: %s has dtype %s; %d is taken for white (arrays.white)", name, dtype, white)
    return white


def _scaled(name: str, array: Array, white: float | None) -> Array:
    """uint8, or float32 with white = 1."""
    if array.size == 0:
        return array.astype(np.uint8)
    if white is None and array.dtype == np.uint8:
        return array
    if array.dtype.kind in "bf":
        array = array.astype(np.float32)
    scale = 1.0 if white is None else white
    low, high = array.min(), array.max()
    # False for NaN, which both are if one value is.
    if not (low >= 0 and high <= scale):
        wrong = f"{name} has values from {low} to {high}; they must lie in [0, {scale:g}]"
        wrong += "" if white is None else ", as white says"
        is_byte_scale = white is None and low >= 0 and high <= 255
        raise ValueError(wrong + (" (or say arrays.white = 255)" if is_byte_scale else ""))
    if array.dtype.kind in "iu" and scale in (255, 4095, 65535):
        return eight_bits(array, int(scale))
    pixels = array.astype(np.float32, copy=False)
    return pixels if scale == 1 else pixels / np.float32(scale)


def _channels_first(name: str, array: Array, channels: str | None) -> Array:
    shape = array.shape
    if len(shape) == 3:
        return array[:, None]
    if len(shape) != 4:
        raise ValueError(
            f"{name} has shape {shape}; allowed are [N, H, W], [N, H, W, C] and [N, C, H, W]"
        )
    given = {None: (1, 3), "first": (1,), "last": (3,)}[channels]
    axes = [axis for axis in given if shape[axis] in _CHANNEL_COUNTS]
    axes = axes or [axis for axis in given if shape[axis] == 4]
    if len(axes) == 1:
        return array if axes == [1] else array.transpose(0, 3, 1, 2)
    if channels is not None:
        raise ValueError(
            f"{name} has shape {shape}; with channels={channels!r}, there must be 1, 3 or 4"
        )
    raise ValueError(
        f"{name} has shape {shape}; the channels must be on axis 1 or axis 3, whichever has size "
        "1, 3 or 4, but "
        + (
            "both have such a size: say arrays.channels = 'last'"
            if axes
            else "neither has such a size"
        )
    )


def _on_white(pixels: Array) -> Array:
    """RGBA [N, 4, H, W] as RGB: each value weighted by its opacity, and white by the rest."""
    white = 255 if pixels.dtype == np.uint8 else 1
    parts = []
    for some in np.array_split(pixels, max(1, len(pixels) // 1000)):
        opacity = some[:, 3:].astype(np.float32) / white
        mixed = opacity * some[:, :3] + (1 - opacity) * white
        parts.append((mixed.round() if white == 255 else mixed).astype(pixels.dtype))
    return np.concatenate(parts)


def as_classes(name: str, array: Array) -> tuple[Array, int]:
    """One label an image, int64 or strings [N], and how many classes the form of `array` says.

    Args:
        name: For error messages.
        array: Whole numbers or strings, [N] or [N, 1]; or one-hot [N, K], which says K.

    Raises:
        ValueError: It is none of these.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    described = f"{name} has dtype {array.dtype} and shape {array.shape}"
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "buifSU":
        raise ValueError(f"{described}; it must be whole numbers or strings [N], or one-hot [N, K]")
    if array.ndim == 2:
        is_one_hot = array.dtype.kind in "buif" and bool(
            (((array == 0) | (array == 1)).all(1) & (np.count_nonzero(array, axis=1) == 1)).all()
        )
        if not is_one_hot:
            raise ValueError(
                f"{described}, but not a single 1 in every row of zeros: it must be [N]"
            )
        return array.argmax(1).astype(np.int64), array.shape[1]
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{described}, and they are not UTF-8: {error}") from error
    if array.dtype.kind == "U":
        return array, 0
    if array.dtype.kind == "f":
        values = array.astype(np.float64)
        # Larger floating point numbers are no exact integers.
        is_whole = np.isfinite(values).all() and (abs(values) < 2**53).all()
        if not (is_whole and (values % 1 == 0).all()):
            raise ValueError(f"{described}, but values that are no whole numbers")
    return array.astype(np.int64), 0
