"""Several runs side by side: one table, and one picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dd.evaluation.names import RESULTS
from dd.runtime.files import DamagedFileError, read_json
from dd.runtime.plain import plain

Runs = Mapping[str, Mapping[str, Any]]


def load_results(folders: Sequence[Path]) -> dict[str, Any]:
    """What was measured in each run, by the run's name.

    Raises:
        FileNotFoundError: A folder holds no results.
        DamagedFileError: A result is not what `python -m dd.evaluate` writes.
    """
    runs = {}
    for folder in folders:
        path = folder / RESULTS
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: run python -m dd.evaluate {folder}")
        results = read_json(path)
        if not isinstance(results, dict) or not isinstance(results.get("accuracy"), dict):
            raise DamagedFileError(f"{path} holds no results of an evaluation")
        runs[str(folder)] = results
    return runs


def accuracies(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The accuracies of one run by what they are of, such as `distilled` or `distilled, ViT`."""
    found = dict(results["accuracy"])
    for architecture, across in results.get("architectures", {}).items():
        found |= {f"{name}, {architecture}": value for name, value in across.items()}
    for name, columns in results.get("baselines", {}).items():
        found |= {f"{name}, {labels}": value for labels, value in columns.items()}
    return {name.replace("_", " "): value for name, value in found.items() if value is not None}


def comparison_table(runs: Runs) -> str:
    """A row for each run; mean ± standard deviation over networks, in %, with the protocol."""
    columns = list(dict.fromkeys(name for run in runs.values() for name in accuracies(run)))
    rows = [["run", "images per class", "stored floats", "protocol", *columns]]
    for name, run in runs.items():
        found = accuracies(run)
        cells = [
            f"{100 * found[column]['mean']:.1f} ± {100 * found[column]['std']:.1f}"
            if column in found
            else "–"
            for column in columns
        ]
        floats = run.get("stored_floats")
        size = [str(run["images_per_class"]), "–" if floats is None else f"{floats:,}"]
        rows.append([name, *size, run["protocol"], *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def comparison_plot(runs: Runs) -> bytes:
    """Accuracy of every run with error bars of one standard deviation, as a PNG file."""
    columns = list(dict.fromkeys(name for run in runs.values() for name in accuracies(run)))
    figure = Figure(figsize=(2 + 1.2 * len(columns), 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, run) in enumerate(runs.items()):
        found = accuracies(run)
        shown = [column for column in columns if column in found]
        offset = 0.6 * ((index + 0.5) / len(runs) - 0.5)
        axes.errorbar(
            [columns.index(column) + offset for column in shown],
            [100 * found[column]["mean"] for column in shown],
            [100 * found[column]["std"] for column in shown],
            fmt="o",
            capsize=4,
            label=_literal(f"{name} ({run['protocol']})"),
        )
    axes.set_xticks(range(len(columns)), map(_literal, columns), rotation=20, ha="right")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _literal(text: str) -> str:
    """A text that matplotlib shows as it is, and does not take for a formula."""
    return plain(text).replace("$", r"\$")
