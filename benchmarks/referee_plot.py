"""The referee's picture: gaps against processor seconds, a panel for each problem."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from referee_report import LEVELS, Row, by_problem

#: What is drawn, and how: this library's lines are solid, the others' dashed.
STYLES = {
    "Adjoint": ("C0", "-"),
    "Adjoint, compiled": ("C9", "-"),
    "Implicit, CG(20)": ("C2", "-"),
    "Implicit, CG(20), compiled": ("C8", "-"),
    "AmIGO": ("C1", "-"),
    "AmIGO, compiled": ("C3", "-"),
    "Penalty": ("C5", "-"),
    "by hand": ("0.3", "--"),
    "by hand, CG(20)": ("0.65", "--"),
    "higher": ("C6", "--"),
    "torchopt": ("C4", "--"),
    "boat, RAD": ("tan", "--"),
    "boat, CG(20)": ("olive", "--"),
    "jax + optax": ("k", "--"),
    "jaxopt, CG(20)": ("k", ":"),
}
COLUMNS = 3


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write it as PNG."""
    problems = by_problem(rows)
    height = -(-(len(problems) + 1) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.6 * height), layout="constrained")
    panels = figure.subplots(height, COLUMNS, squeeze=False).ravel()
    handles = {}
    for axes, (problem, found) in zip(panels, problems.items(), strict=False):
        for method, (colour, style) in STYLES.items():
            if method not in found.methods:
                continue
            points = [
                (statistics.median(seconds), level)
                for level in LEVELS
                if (seconds := found.seconds(method, level))
            ]
            if points:
                (handles[method],) = axes.loglog(
                    *zip(*points, strict=True), style, color=colour, marker="o", markersize=3
                )
        axes.set(title=problem, xlabel="processor seconds", ylabel="gap, of that at the start")
        axes.set_ylim(LEVELS[-1] / 1.3, LEVELS[0] * 1.3)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    for axes in panels[len(problems) :]:
        axes.axis("off")
    names = [name for name in STYLES if name in handles]
    panels[len(problems)].legend([handles[name] for name in names], names, loc="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
