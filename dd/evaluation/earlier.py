"""Figures of an earlier evaluation, which stay in its file until they are measured again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dd.runtime.files import DamagedFileError, read_json

#: Of results, what is measured: each by what it is of.
FIGURES = ("accuracy", "architectures", "baselines", "scores")
#: What results must have in common for the figures of one to be those of the other.
SAME = (
    "dataset",
    "data",
    "class_names",
    "distilled_set",
    "network",
    "network_parameters",
    "protocol",
    "seed",
)


def earlier_results(path: Path) -> dict[str, Any]:
    """The results in a file; none, if it is not there, or cannot be read."""
    try:
        found = read_json(path)
    except (DamagedFileError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def with_earlier(results: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Results, and what earlier ones of the same set, network and protocol have beside them."""
    same = all(name in results and results[name] == earlier.get(name) for name in SAME)
    if not same:
        return dict(results)
    return {
        name: _merged(value, earlier.get(name)) if name in FIGURES else value
        for name, value in results.items()
    }


def _merged(found: Any, earlier: Any) -> Any:
    """Name by name, tables within tables, the new figure if there is one."""
    if found is None or not isinstance(earlier, Mapping):
        return earlier if found is None else found
    if "mean" in found:
        return found  # one figure, with what belongs to it
    names = {**earlier, **found}
    return {name: _merged(found.get(name), earlier.get(name)) for name in names}
