"""Log-log line charts as PNG, drawn with Pillow, which torchvision brings along."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEGEND = 480, 520, 260
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 40, 60
#: Colours that also differ for the colour-blind (Tol's "muted" and "bright" schemes).
COLOURS = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255"),
    *("#aa4499", "#ee6677", "#4477aa", "#66ccee", "#228833", "#000000"),
)
INK, GRID = "#222222", "#dddddd"


@dataclass(frozen=True)
class Series:
    """A named line through points (x, y), both above 0."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(panels: Mapping[str, Sequence[Series]], x_label: str, y_label: str, path: Path) -> None:
    """Write panels side by side, with one legend for all of them."""
    names = list(dict.fromkeys(series.name for group in panels.values() for series in group))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    image = Image.new("RGB", (WIDTH * len(panels) + LEGEND, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    for index, (title, group) in enumerate(panels.items()):
        _panel(pen, font, index * WIDTH, title, group, colours, x_label, y_label)
    for row, name in enumerate(names):
        x, y = WIDTH * len(panels) + 10, TOP + 26 * row
        pen.line((x, y + 9, x + 26, y + 9), fill=colours[name], width=3)
        pen.text((x + 34, y), name, fill=INK, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def _panel(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    offset: int,
    title: str,
    group: Sequence[Series],
    colours: Mapping[str, str],
    x_label: str,
    y_label: str,
) -> None:
    points = [point for series in group for point in series.points]
    x_range, y_range = (_decades([point[axis] for point in points]) for axis in (0, 1))
    left, right = offset + LEFT, offset + WIDTH - RIGHT
    top, bottom = TOP, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_range[0]) / (x_range[1] - x_range[0])
        up = (math.log10(y) - y_range[0]) / (y_range[1] - y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    for power in range(x_range[0], x_range[1] + 1):
        x, _ = place(10.0**power, 10.0 ** y_range[0])
        pen.line((x, top, x, bottom), fill=GRID)
        pen.text((x, bottom + 6), f"1e{power}", fill=INK, font=font, anchor="ma")
    for power in range(y_range[0], y_range[1] + 1, 2 if y_range[1] - y_range[0] > 8 else 1):
        _, y = place(10.0 ** x_range[0], 10.0**power)
        pen.line((left, y, right, y), fill=GRID)
        pen.text((left - 8, y), f"1e{power}", fill=INK, font=font, anchor="rm")
    pen.rectangle((left, top, right, bottom), outline=INK)
    pen.text(((left + right) / 2, 10), title, fill=INK, font=font, anchor="ma")
    pen.text(((left + right) / 2, HEIGHT - 28), x_label, fill=INK, font=font, anchor="ma")
    pen.text((offset + 8, 10), y_label, fill=INK, font=font)
    for series in group:
        placed = [place(*point) for point in series.points]
        pen.line(placed, fill=colours[series.name], width=2)
        for x, y in placed:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colours[series.name])


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around all values, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)
