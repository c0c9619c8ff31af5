"""Log-log line charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Series:
    """A named line through points (x, y), both above 0."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(panels: Mapping[str, Sequence[Series]], x_label: str, y_label: str, path: Path) -> None:
    """Write panels side by side, with one legend for all of them."""
    figure = Figure(figsize=(5 * len(panels) + 2.5, 5), layout="constrained")
    names = list(dict.fromkeys(series.name for group in panels.values() for series in group))
    # Twenty colours in two line styles, so that lines on top of each other are both seen.
    styles = {
        name: (f"C{index % 10}", "-" if index < 10 else "--") for index, name in enumerate(names)
    }
    handles = {}
    for axes, (title, group) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for series in group:
            colour, style = styles[series.name]
            (handles[series.name],) = axes.loglog(
                *zip(*series.points, strict=True), style, color=colour, marker="o", markersize=4
            )
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
    figure.legend([handles[name] for name in names], names, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
