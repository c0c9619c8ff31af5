"""Text in pictures, in the font that matplotlib brings, whose letters are those of most scripts."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dd.runtime.plain import one_line


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font at a height in pixels; matplotlib, which takes long, is not imported for it."""
    found = find_spec("matplotlib")
    places = None if found is None else found.submodule_search_locations
    assert places, "dd depends on it"
    folder = Path(places[0]) / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), size)


def label(text: str, width: int, size: int = 11, colour: str = "black") -> Image.Image:
    """A line of text on white, "RGB", of its own height; what is longer than `width` is cut."""
    letters, text = font(size), one_line(text)
    if letters.getlength(text) > width:
        while text and letters.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    picture = Image.new("RGB", (width, size + 5), "white")
    left = max(0, (width - round(letters.getlength(text))) // 2)
    ImageDraw.Draw(picture).text((left, 1), text, fill=colour, font=letters)
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """The same, to be read from below to above."""
    return picture.transpose(Image.Transpose.ROTATE_90)
