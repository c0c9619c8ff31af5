"""Picture files, read as a viewer shows them: the one way in which a file becomes pixels."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor
from torchvision.transforms import functional

from bilevel.checks import check_choice

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
#: Formats that may hold several frames, or 16 bits a channel.
_SEVERAL_FRAMES = (".gif", ".apng", ".png", ".webp", ".avif", ".tif", ".tiff")
_DEEP = (".png", ".apng", ".tif", ".tiff", ".pgm", ".pnm", ".ppm", ".jp2", ".j2k", ".jpx", ".im")
#: What white can be in 8, 10, 12, 14 or 16 bits.
WHITES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)
#: How a picture that is not square is made so.
FITS = ("crop", "pad")
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


def decode_image(
    path: str,
    image_size: int,
    channels: int = 3,
    *,
    fit: str = "crop",
    background: str = "white",
    white: int | None = None,
) -> Tensor:
    """One picture, uint8 [channels, image_size, image_size]; may be called from any thread.

    It is turned as its EXIF orientation says, composited on the background where it is transparent,
    and made RGB or greyscale; of several frames the first is read. Pixels of 16 bits lose their
    lower 8, or as `eight_bits` says. It is made square as `as_square` says.

    Args:
        path: The file, in a format that Pillow decodes by itself.
        image_size: Height and width of the result.
        channels: 3 for RGB, 1 for greyscale.
        fit: One of `FITS`.
        background: A colour by a name that Pillow knows, or "#rrggbb".
        white: The value of white where a channel has 16 bits, one of `WHITES`; default: the least
            of 255, 4095 and 65535 that no pixel exceeds, which is said. For many pictures,
            `survey` finds one for all.

    Raises:
        ValueError: The file cannot be decoded, or its pixels are no integers of 8 or 16 bits, or
            exceed `white`; the message names it.
    """
    try:
        # Opening a pipe would wait for whoever writes to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        with Image.open(path, formats=_FORMATS) as file:
            file.load()
            return to_pixels(file, image_size, channels, fit, background, white)
    except Exception as error:  # Pillow reports damage in a dozen ways, by format.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot decode the image {path}: {reason}") from error


def to_pixels(
    image: Image.Image,
    image_size: int | None,
    channels: int | None = None,
    fit: str = "crop",
    background: str = "white",
    white: int | None = None,
) -> Tensor:
    """An open picture, uint8 [channels, H, W], as `decode_image` has it.

    Args:
        image: The picture.
        image_size: H and W; None: as it is.
        channels: 3 for RGB, 1 for greyscale; None: as it is.
        fit: As for `decode_image`, as for the next two.
        background: A colour.
        white: The value of white where a channel has 16 bits.

    Raises:
        ValueError: Its pixels are no integers of 8 or 16 bits, exceed `white`, or cannot be made
            square.
    """
    turn = _turn(image)
    if channels is None:
        channels = 1 if image.mode.startswith(("1", "L", "I")) else 3
    shown = _opaque(image, background, white).convert("RGB" if channels == 3 else "L")
    if turn is not None:
        shown = shown.transpose(turn)
    if image_size is not None:
        shown = as_square(shown, image_size, fit, background)
    return functional.pil_to_tensor(shown)


def as_square(
    image: Image.Image, image_size: int, fit: str = "crop", background: str = "white"
) -> Image.Image:
    """A picture as a square, resized bilinearly with antialiasing.

    Args:
        image: "RGB" or "L".
        image_size: Height and width of the result.
        fit: "crop": its shorter side becomes `image_size`, and the centre is kept; "pad": its
            longer side does, and it lies in the middle of the background.
        background: A colour.

    Raises:
        ValueError: It is a strip that cannot be cropped.
    """
    shorter, longer = sorted(image.size)
    if fit == "crop":
        if longer * image_size > shorter * 2**16:
            raise ValueError(
                f"its {image.width}×{image.height} pixels are a strip that cannot be made square"
            )
        resized = functional.resize(
            image, [image_size], functional.InterpolationMode.BILINEAR, antialias=True
        )
        return functional.center_crop(resized, [image_size, image_size])
    height, width = (max(1, round(side * image_size / longer)) for side in image.size[::-1])
    resized = functional.resize(
        image, [height, width], functional.InterpolationMode.BILINEAR, antialias=True
    )
    colour = ImageColor.getcolor(background, image.mode)
    square = Image.new(image.mode, (image_size, image_size), colour)
    square.paste(resized, ((image_size - width) // 2, (image_size - height) // 2))
    return square


def check_reading(fit: str, background: str, white: int | None) -> None:
    """Raise `ValueError` unless `decode_image` takes these."""
    check_choice("fit", fit, FITS)
    check_choice("white", white, (None, *WHITES))
    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"background={background!r}: it must be a colour, such as 'white' or '#808080'"
        ) from error


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


def summary(counted: Iterable[str], most: int = 4) -> str:
    """Names with how often each occurs, the frequent ones first: "a.txt, .heic (12), …"."""
    counts = Counter(counted).most_common()
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts[:most]]
    return ", ".join(shown) + (", …" if len(counts) > most else "")


def survey(paths: Iterable[str], white: int | None = None) -> int | None:
    """Look at pictures that belong together; say what is not as one might think, a line each.

    Args:
        paths: The files.
        white: The value of white where a channel has 16 bits, if it is known.

    Returns:
        That value: the given one, or the least of 255, 4095 and 65535 that no pixel of any of them
        exceeds, so that a dark picture among others stays dark; None if none has 16 bits.
    """
    several, deep, highest = [], 0, 0
    for path in paths:
        if not path.lower().endswith((*_SEVERAL_FRAMES, *_DEEP)):
            continue
        # What is wrong with a file is said when it is decoded.
        with contextlib.suppress(Exception), Image.open(path, formats=_FORMATS) as file:
            if getattr(file, "n_frames", 1) > 1:
                several.append(path)
            if file.mode.startswith("I") and white is None:
                highest = max(highest, int(np.asarray(file).max()))
                deep += 1
    if several:
        _log.warning(
            "note: %d pictures have several frames, of which the first is read: %s",
            len(several),
            summary(os.path.basename(path) for path in several),
        )
    if not deep or highest >= 2**16:
        return white
    found = narrowest_white(highest)
    if found < 2**16 - 1:
        _log.warning(
            "note: no pixel of %d pictures with 16 bits a channel exceeds %d, so %d is taken for "
            "white (white = 65535 if they are to stay dark)",
            deep,
            highest,
            found,
        )
    return found


def _opaque(image: Image.Image, background: str, white: int | None) -> Image.Image:
    """The image with pixels of one byte, and the background where it is transparent."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        if image.mode.startswith("F") or pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError(f"its pixels are neither of 8 nor of 16 bits (mode {image.mode})")
        if white is None:
            white = narrowest_white(int(pixels.max()))
            if white < 2**16 - 1:
                file = getattr(image, "filename", "a picture")
                _log.warning("note: %d is taken for white in %s", white, file)
        grey = eight_bits(pixels, white)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[pixels == transparent] = ImageColor.getcolor(background, "L")
        return Image.fromarray(grey)
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    opaque = Image.new("RGBA", layer.size, background)
    opaque.alpha_composite(layer)
    return opaque


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, if anything; damaged EXIF data is as none."""
    with contextlib.suppress(Exception):
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return None
