"""Charts over outer steps, drawn pixel by pixel, which takes milliseconds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from dd.runtime.lettering import font

Raster = NDArray[np.uint8]

#: More outer steps than this are thinned out, again and again by half.
MOST_COLUMNS = 512
_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW = 640, 240, 56, 24, 36
#: Colours of the early, middle and late stage, and of a schedule without stages.
STAGES = {"early": (230, 159, 0), "middle": (0, 114, 178), "late": (0, 158, 115)}
NO_STAGE = (90, 90, 90)
#: From low to high values; what is not known stays white.
_SCALE = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64
)


class Chart(ABC):
    """A picture with a column for each outer step, and the inner steps from below to above.

    Args:
        title: Above it.
        inner_steps: T.
    """

    def __init__(self, title: str, inner_steps: int) -> None:
        self.title = title
        self.inner_steps = inner_steps
        #: One of so many outer steps is drawn: by its number, divided by that, what it was.
        self._every = 1
        self._columns: dict[int, Any] = {}
        self._last = 0

    def picture(self) -> Tensor:
        """What is known so far, uint8 [3, H, W]."""
        first = min(self._columns)
        width = max(self._columns) - first + 1
        raster = np.full((self.inner_steps, width, 3), 255, np.uint8)
        places = [place - first for place in self._columns]
        self._draw(raster, places, list(self._columns.values()))
        plot = Image.fromarray(raster[::-1]).resize((_WIDTH, _HEIGHT), Image.Resampling.NEAREST)
        canvas = Image.new("RGB", (_LEFT + _WIDTH + 12, _TOP + _HEIGHT + _BELOW), "white")
        canvas.paste(plot, (_LEFT, _TOP))
        draw, letters = ImageDraw.Draw(canvas), font(11)
        draw.rectangle((_LEFT - 1, _TOP - 1, _LEFT + _WIDTH, _TOP + _HEIGHT), outline="grey")
        low, high = _TOP + _HEIGHT, _TOP
        for text, position, anchor in (
            (self.title, (_LEFT, 5), "la"),
            (f"{first * self._every}", (_LEFT, low + 4), "la"),
            (f"{self._last}", (_LEFT + _WIDTH, low + 4), "ra"),
            ("outer step", (_LEFT + _WIDTH // 2, low + 4), "ma"),
            ("0", (_LEFT - 5, low), "rs"),
            (f"{self.inner_steps}", (_LEFT - 5, high), "ra"),
            ("inner", (_LEFT - 5, (low + high) // 2 - 7), "rm"),
            ("step", (_LEFT - 5, (low + high) // 2 + 7), "rm"),
        ):
            draw.text(position, text, "black", letters, anchor=anchor)
        right = _LEFT + _WIDTH
        for text, colour in reversed(list(self._legend().items())):
            draw.text((right, 5), text, "black", letters, anchor="ra")
            right -= round(letters.getlength(text)) + 14
            draw.rectangle((right, 6, right + 9, 15), colour)
            right -= 12
        return pil_to_tensor(canvas)

    def _append(self, step: int, value: Any) -> None:
        self._last = step
        self._columns.setdefault(step // self._every, value)
        if len(self._columns) > MOST_COLUMNS:
            self._every *= 2
            thinned: dict[int, Any] = {}
            for place, kept in self._columns.items():
                thinned.setdefault(place // 2, kept)
            self._columns = thinned

    @abstractmethod
    def _draw(self, raster: Raster, places: list[int], values: list[Any]) -> None:
        """Fill columns of a white [inner steps, columns, 3], the first inner step first."""

    @abstractmethod
    def _legend(self) -> Mapping[str, tuple[int, int, int]]:
        """What colours mean."""


@final
class WindowBand(Chart):
    """The inner steps that each outer step differentiates, in the colour of the stage."""

    def append(self, step: int, start: int, stop: int, stage: str | None) -> None:
        """What an outer step did: its window [start, stop), and the stage if there is one."""
        self._append(step, (start, stop, stage))

    def _draw(self, raster: Raster, places: list[int], values: list[Any]) -> None:
        for place, (start, stop, stage) in zip(places, values, strict=True):
            raster[start:stop, place] = STAGES.get(stage, NO_STAGE)

    def _legend(self) -> Mapping[str, tuple[int, int, int]]:
        there = {stage for _, _, stage in self._columns.values()}
        found = {f"{name} stage": colour for name, colour in STAGES.items() if name in there}
        return found | ({"window": NO_STAGE} if None in there else {})


@final
class HeatMap(Chart):
    """Positive values over the inner steps, by their logarithm."""

    def append(self, step: int, values: Tensor, start: int = 0) -> None:
        """The values at the inner steps from `start` on, [n]; where there are none stays white."""
        column = np.full(self.inner_steps, np.nan)
        found = values.detach().to(torch.float64).cpu().numpy()[: self.inner_steps - start]
        column[start : start + len(found)] = found
        self._append(step, column)

    def _draw(self, raster: Raster, places: list[int], values: list[Any]) -> None:
        raised = np.stack(values, axis=1)
        known = np.isfinite(raised) & (raised > 0)
        logs = np.log(np.where(known, raised, 1.0))
        low, high = self._bounds(logs, known)
        position = (logs - low) / max(high - low, 1e-12) * (len(_SCALE) - 1)
        below = np.clip(position.astype(int), 0, len(_SCALE) - 2)
        part = np.clip(position - below, 0, 1)[..., None]
        colours = (1 - part) * _SCALE[below] + part * _SCALE[below + 1]
        colours[~known] = 255
        raster[:, places] = colours.astype(np.uint8)

    def _bounds(self, logs: NDArray[Any], known: NDArray[Any]) -> tuple[float, float]:
        """The range without its outermost hundredths."""
        return tuple(np.quantile(logs[known], (0.01, 0.99))) if known.any() else (0.0, 1.0)

    def _legend(self) -> Mapping[str, tuple[int, int, int]]:
        raised = np.stack(list(self._columns.values()), axis=1)
        known = np.isfinite(raised) & (raised > 0)
        bounds = self._bounds(np.log(np.where(known, raised, 1.0)), known)
        colours = (tuple(map(int, _SCALE[index])) for index in (0, -1))
        return {f"{np.exp(of):.2g}": colour for of, colour in zip(bounds, colours, strict=True)}  # type: ignore[misc]
