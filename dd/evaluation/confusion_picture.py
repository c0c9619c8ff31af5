"""A picture of what is taken for what."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from dd.runtime.lettering import font, label, upright

#: So many classes are named, and their cells have a number.
MOST_NAMED = 30
_CELL, _NAME = 34, 110


def confusion_picture(counts: Tensor, class_names: Sequence[str]) -> bytes:
    """Of the images of each class (row) the share taken for each class (column), as a PNG file.

    Args:
        counts: int64 [K, K].
        class_names: K names.
    """
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).tolist()
    named = len(shares) <= MOST_NAMED
    cell = _CELL if named else max(1, 900 // len(shares))
    margin = _NAME if named else 20
    side = margin + cell * len(shares) + 8
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    for row, of_class in enumerate(shares):
        for column, share in enumerate(of_class):
            left, top = margin + column * cell, margin + row * cell
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), _colour(share))
            if named and share >= 0.005:
                ink = "white" if share > 0.5 else "black"
                centre = (left + cell // 2, top + cell // 2)
                draw.text(centre, f"{100 * share:.0f}", ink, font(12), anchor="mm")
        if named:
            name = label(class_names[row], margin - 12)
            picture.paste(name, (4, margin + row * cell + (cell - name.height) // 2))
            across = upright(name)
            picture.paste(across, (margin + row * cell + (cell - across.width) // 2, 4))
    draw.text((6, 4), "true ↓", "grey", font(11))
    if named:
        draw.text((6, 20), "taken for →", "grey", font(11))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _colour(share: float) -> tuple[int, int, int]:
    """From white to dark blue."""
    low, high = (247, 250, 255), (8, 48, 107)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue
