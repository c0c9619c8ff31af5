"""Picture files, read as a viewer shows them: the one way in which a file becomes pixels."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

# Pillow knows these by name only, or hands them to another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What tools and desktops leave behind; whatever begins with a dot is left out as well.
_LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "icon\r"}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_log = logging.getLogger(__name__)

Image.init()
_FORMATS = sorted(Image.OPEN.keys() - _NOT_DECODED)
#: How a picture's name ends, in lower case: whatever Pillow decodes by itself.
EXTENSIONS = frozenset(
    extension for extension, name in Image.registered_extensions().items() if name in _FORMATS
)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was left by a tool, and is neither class nor image."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def is_picture(name: str) -> bool:
    """Whether a file of this name is read as a picture."""
    return not is_leftover(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def decode_image(path: str, image_size: int, channels: int = 3) -> Tensor:
    """One picture, uint8 [channels, image_size, image_size]; may be called from any thread.

    It is turned as its EXIF orientation says, composited on white where it is transparent, and
    made RGB or greyscale; of several frames the first is read. Pixels of 16 bits lose their lower
    8, or as `eight_bits` says. The shorter side is resized to `image_size` (bilinear,
    antialiased), and the centre is cropped.

    Args:
        path: The file, in a format that Pillow decodes by itself.
        image_size: Height and width of the result.
        channels: 3 for RGB, 1 for greyscale.

    Raises:
        ValueError: The file cannot be decoded, or its pixels are no integers of 8 or 16 bits;
            the message names it.
    """
    try:
        # Opening a pipe would wait for whoever writes to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        with Image.open(path, formats=_FORMATS) as file:
            file.load()
            turn = _turn(file)
            image = _on_white(file).convert("RGB" if channels == 3 else "L")
    # Pillow reports damage as any of these, depending on the format.
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        MemoryError,
        struct.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot decode the image {path}: {reason}") from error
    if turn is not None:
        image = image.transpose(turn)
    shorter, longer = sorted(image.size)
    if longer * image_size > shorter * 2**16:
        raise ValueError(
            f"cannot decode the image {path}: its {image.width}×{image.height} pixels are a strip "
            "that cannot be made square"
        )
    resized = functional.resize(
        image, [image_size], functional.InterpolationMode.BILINEAR, antialias=True
    )
    return functional.pil_to_tensor(functional.center_crop(resized, [image_size, image_size]))


def eight_bits(pixels: NDArray[Any], white: int | None = None) -> NDArray[np.uint8]:
    """Integers of up to 16 bits as uint8.

    Args:
        pixels: Integers in [0, 2^16), any shape.
        white: The value of white, 255, 4095 or 65535; default: the least that none exceeds. So
            the 12 bits that many cameras and scanners store in 16 fill the range.
    """
    if white is None:
        white = narrowest_white(pixels)
    return (pixels // ((white + 1) // 256)).astype(np.uint8)


def narrowest_white(pixels: NDArray[Any]) -> int:
    """The least of 255, 4095 and 65535 that no pixel exceeds."""
    highest = int(pixels.max())
    return next(white for white in (2**8 - 1, 2**12 - 1, 2**16 - 1) if highest <= white)


def summary(counted: Iterable[str], most: int = 4) -> str:
    """Names with how often each occurs, the frequent ones first: "a.txt, .heic (12), …"."""
    counts = Counter(counted).most_common()
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts[:most]]
    return ", ".join(shown) + (", …" if len(counts) > most else "")


def say_about_files(paths: Iterable[str]) -> None:
    """Say in one line which of these pictures hold more frames than the one that is read."""
    several = []
    for path in paths:
        if not path.lower().endswith((".gif", ".apng", ".png", ".webp", ".avif", ".tif", ".tiff")):
            continue
        try:
            with Image.open(path, formats=_FORMATS) as file:
                if getattr(file, "n_frames", 1) > 1:
                    several.append(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # decoding it says why
    if several:
        _log.warning(
            "note: %d pictures have several frames, of which the first is read: %s",
            len(several),
            summary(os.path.basename(path) for path in several),
        )


def _on_white(image: Image.Image) -> Image.Image:
    """The image with pixels of one byte, and white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        if image.mode.startswith("F") or pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError(f"its pixels are neither of 8 nor of 16 bits (mode {image.mode})")
        grey = eight_bits(pixels)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[pixels == transparent] = 255
        return Image.fromarray(grey)
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, if anything; damaged EXIF data is as none."""
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return None
