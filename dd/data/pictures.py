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
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional

from bilevel.checks import check_choice
from dd.data.sixteen_bits import (
    WHITES,
    deep_colours,
    eight_bits,
    is_deep_colour,
    narrowest_white,
)

# Pillow knows these by name only, or hands them to another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What tools and desktops leave behind; whatever begins with a dot is left out as well.
_LEFTOVERS = {
    *("__macosx", "__pycache__", "thumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle"),
    *("$recycle.bin", "system volume information", "lost+found"),
}
_ORIENTATION = 0x0112
_PHOTOMETRIC = 0x0106
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
#: How a picture that is not square is made so.
FITS = ("crop", "pad")
_log = logging.getLogger(__name__)

Image.init()
_FORMATS = sorted(Image.OPEN.keys() - _NOT_DECODED)
#: How a picture's name ends, in lower case: whatever Pillow decodes by itself. An MPO, as of phones
#: and stereo cameras, is opened as a JPEG.
EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in (*_FORMATS, "MPO")
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
    and made RGB or greyscale; of several frames the first is read. Pixels of 16 bits become 8 as
    `eight_bits` says. It is made square as `as_square` says.

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
            shown = _of_deep_colours(file, path, white) if is_deep_colour(file) else file
            shown.load()
            return to_pixels(shown, image_size, channels, fit, background, white)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"cannot decode the image {path}: what it holds is no picture in a format that Pillow "
            "reads; convert it, or remove it"
        ) from error
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
        channels = 1 if image.mode.partition(";")[0] in ("1", "L", "LA", "La", "I") else 3
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
            if white is None and (pixels := _deep_pixels(file, path)) is not None:
                highest = max(highest, int(pixels.max()))
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


def _deep_pixels(file: Image.Image, path: str) -> NDArray[Any] | None:
    """The pixels of a file that was just opened, without opacity; None if they have 8 bits."""
    if is_deep_colour(file):
        with Image.open(path, formats=_FORMATS) as again:
            return deep_colours(file, again)[..., :3]
    return _greys(file) if file.mode.startswith("I") else None


def _of_deep_colours(file: Image.Image, path: str, white: int | None) -> Image.Image:
    """A picture with 16 bits a channel, just opened, as one with 8."""
    with Image.open(path, formats=_FORMATS) as again:
        pixels = deep_colours(file, again)
    colours = eight_bits(pixels[..., :3], _said_white(pixels[..., :3], white, path))
    opacity = (pixels[..., 3:] // 256).astype(np.uint8)
    shown = Image.fromarray(np.concatenate([colours, opacity], axis=2))
    shown.info["exif"] = file.getexif().tobytes()
    return shown


def _greys(image: Image.Image) -> NDArray[Any]:
    """The pixels of a mode that begins with I or F; a TIFF may say that its white is 0."""
    pixels = np.asarray(image)
    white_is_zero = image.mode.startswith("I;16") and _tag(image, _PHOTOMETRIC) == 0
    return 65535 - pixels if white_is_zero else pixels


def _tag(image: Image.Image, number: int) -> Any:
    return getattr(image, "tag_v2", {}).get(number)


def _said_white(pixels: NDArray[Any], white: int | None, name: str) -> int:
    """The given value of white, or the one found, which is said."""
    if white is None:
        white = narrowest_white(int(pixels.max()))
        if white < 2**16 - 1:
            _log.warning("note: %d is taken for white in %s", white, name)
    return white


def _opaque(image: Image.Image, background: str, white: int | None) -> Image.Image:
    """The image with pixels of one byte, and the background where it is transparent."""
    if image.mode.startswith(("I", "F")):
        pixels = _greys(image)
        if image.mode.startswith("F") or pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError(f"its pixels are neither of 8 nor of 16 bits (mode {image.mode})")
        name = str(getattr(image, "filename", "a picture"))
        grey = eight_bits(pixels, _said_white(pixels, white, name))
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
