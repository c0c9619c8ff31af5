"""Several runs side by side: a table for each dataset, and one picture."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dd.evaluation.names import RESULTS
from dd.runtime.files import DamagedFileError, read_json
from dd.runtime.plain import plain

#: Characters of a line in the legend of a picture.
LINE = 40
Runs = Mapping[str, Mapping[str, Any]]


def load_results(folders: Sequence[Path]) -> dict[str, Any]:
    """What was measured in each run: its own judgement by the run's name, others by their file's.

    Args:
        folders: Of runs, or files of results.

    Raises:
        FileNotFoundError: A folder holds no results.
        DamagedFileError: A result is not what `python -m dd.evaluate` writes.
    """
    runs = {}
    for folder in folders:
        own = folder if folder.suffix == ".json" else folder / RESULTS
        others = sorted(folder.glob(f"{own.stem}-*.json")) if own != folder else []
        if not (own.is_file() or others):
            raise FileNotFoundError(f"{own} does not exist: run python -m dd.evaluate {folder}")
        for path in [own, *others] if own.is_file() else others:
            results = read_json(path)
            if not isinstance(results, dict) or not isinstance(results.get("accuracy"), dict):
                raise DamagedFileError(f"{path} holds no results of an evaluation")
            runs[str(folder if path == own else path)] = results
    return runs


def accuracies(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The accuracies of one run by what they are of, such as `distilled` or `distilled, ViT`."""
    found = dict(results["accuracy"])
    for architecture, across in results.get("architectures", {}).items():
        found |= {f"{name}, {architecture}": value for name, value in across.items()}
    for name, columns in results.get("baselines", {}).items():
        found |= {f"{name}, {labels}": value for labels, value in columns.items()}
    return {name.replace("_", " "): value for name, value in found.items() if value is not None}


def by_dataset(runs: Runs) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The runs on each dataset, which is another one if its images are, whatever it is called.

    Results of before checksums were told are put with the first of their name.
    """
    groups: dict[tuple[str, str | None], dict[str, Mapping[str, Any]]] = {}
    for name, run in runs.items():
        dataset, data = str(run.get("dataset")), run.get("data")
        same = [key for key in groups if key[0] == dataset and None in (data, key[1])]
        key = (dataset, data) if data is not None and (dataset, data) in groups else None
        groups.setdefault(key or (same[0] if same else (dataset, data)), {})[name] = run
    names = [dataset for dataset, _ in groups]
    return {
        dataset if names.count(dataset) == 1 else f"{dataset}, images {data}": group
        for (dataset, data), group in groups.items()
    }


def comparison_table(runs: Runs) -> str:
    """For each dataset a table: a row for each judgement, mean ± std in %, and its source.

    Accuracies on different datasets say nothing about each other, so they share no table. Those by
    another network, or by another protocol, have rows of their own, which say so.
    """
    groups = by_dataset(runs)
    if len(groups) == 1:
        return _table(runs)
    return "\n\n".join(f"{dataset}\n{_table(group)}" for dataset, group in groups.items())


def _table(runs: Runs) -> str:
    columns = _columns(runs)
    rows = [["run", "images per class", "stored floats", "network", "protocol", *columns]]
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
        rows.append([name, *size, _network(run), run["protocol"], *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    sources = (f"{name}: {run['command']}" for name, run in runs.items() if "command" in run)
    return "\n".join([table, *sources])


def comparison_plot(runs: Runs) -> bytes:
    """Accuracy of every run with error bars of one std, beside each other by dataset, as PNG."""
    groups = by_dataset(runs)
    columns = {name: _columns(group) for name, group in groups.items()}
    widths = [4 + 1.2 * len(names) for names in columns.values()]
    figure = Figure(figsize=(sum(widths), 4), layout="constrained")
    plots = figure.subplots(1, len(groups), squeeze=False, width_ratios=widths)[0]
    for axes, (dataset, group) in zip(plots, groups.items(), strict=True):
        for index, (name, run) in enumerate(group.items()):
            found = accuracies(run)
            shown = [column for column in columns[dataset] if column in found]
            offset = 0.6 * ((index + 0.5) / len(group) - 0.5)
            axes.errorbar(
                [columns[dataset].index(column) + offset for column in shown],
                [100 * found[column]["mean"] for column in shown],
                [100 * found[column]["std"] for column in shown],
                fmt="o",
                capsize=4,
                label=_wrapped(_literal(f"{name} ({_network(run)}, {run['protocol']})")),
            )
        axes.set_xticks(
            range(len(columns[dataset])), map(_literal, columns[dataset]), rotation=20, ha="right"
        )
        axes.set_title(_literal(dataset))
        axes.set_ylabel("test accuracy, %")
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _columns(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for run in runs.values() for name in accuracies(run)))


def _wrapped(text: str) -> str:
    """In lines, as names of folders may be wider than a picture."""
    return "\n".join(textwrap.wrap(text, LINE))


def _network(run: Mapping[str, Any]) -> str:
    """Its class, and its parameters, which tell widths apart."""
    name, parameters = run.get("network", "–"), run.get("network_parameters")
    return str(name) if parameters is None else f"{name}, {parameters:,} parameters"


def _literal(text: str) -> str:
    """A text that matplotlib shows as it is, and does not take for a formula."""
    return plain(text).replace("$", r"\$")
