"""What a search found: a table, a picture, and which parameters matter."""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from dd.search.space import Parameter
from dd.search.study import ERROR, FOLDER, is_done

#: Parts of a number's range whose trials are averaged in the picture.
BINS = 4


def findings(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial that is done, the best first; values are fractions, of the validation split."""
    rows = [
        {
            "trial": trial.user_attrs.get(FOLDER, str(trial.number)),
            "status": "failed" if ERROR in trial.user_attrs else trial.state.name.lower(),
            "accuracy": trial.value if trial.state == TrialState.COMPLETE else _last(trial),
            "looks": len(trial.intermediate_values),
            "parameters": trial.params,
            "error": trial.user_attrs.get(ERROR),
        }
        for trial in study.get_trials(deepcopy=False)
        if is_done(trial)
    ]
    order = {"complete": 0, "pruned": 1, "failed": 2}
    return sorted(rows, key=lambda row: (order[row["status"]], -(row["accuracy"] or 0)))


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of the accuracy's variance that each parameter makes, by functional ANOVA.

    Empty where fewer than two trials, or values, are there to compare.
    """
    values = {trial.value for trial in _complete(study)}
    if len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def table(rows: Sequence[dict[str, Any]], space: Sequence[Parameter]) -> str:
    """A line for each trial."""
    cells = [["trial", "validation", "status", *(each.name for each in space)]]
    for row in rows:
        accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
        values = (row["parameters"].get(each.name) for each in space)
        shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        cells.append([row["trial"], accuracy, row["status"], *shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def picture(study: optuna.Study, space: Sequence[Parameter]) -> bytes:
    """Accuracy against each parameter, a PNG file.

    A point is a trial that was not pruned. Bars are the mean and its standard error over the
    trials with a value, or with one in the same quarter of a range.
    """
    figure = Figure(figsize=(4 * len(space), 3.5), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(space), squeeze=False)[0], space, strict=True):
        trials = [trial for trial in _complete(study) if each.name in trial.params]
        names = list(each.values) if each.kind == "choice" else []
        groups: dict[float, list[float]] = {}
        for trial in trials:
            value, accuracy = trial.params[each.name], 100 * (trial.value or 0.0)
            at = float(names.index(value)) if names else float(value)
            axes.plot(at, accuracy, "o", color="0.6", markersize=4)
            groups.setdefault(at if names else _middle(each, at), []).append(accuracy)
        for at, found in groups.items():
            error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
            axes.errorbar(at, statistics.fmean(found), yerr=error, fmt="s", color="C0", capsize=4)
        if names:
            ticks = [str(name) for name in names]
            axes.set_xticks(range(len(names)), ticks, rotation=20, ha="right")
            axes.margins(x=0.2)
        elif each.kind == "log":
            axes.set_xscale("log")
        axes.set_xlabel(each.name)
        axes.set_ylabel("validation accuracy, %")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _last(trial: FrozenTrial) -> float | None:
    looks = trial.intermediate_values
    return looks[max(looks)] if looks else None


def _middle(parameter: Parameter, value: float) -> float:
    """The middle of the quarter of the range that a value is in."""
    low, high = (float(bound) for bound in parameter.values)
    if parameter.kind == "log":
        low, high, value = math.log(low), math.log(high), math.log(value)
    part = min(int(BINS * (value - low) / (high - low)), BINS - 1)
    middle = low + (part + 0.5) * (high - low) / BINS
    return math.exp(middle) if parameter.kind == "log" else middle
