"""`results.json`: what a run found, written again whenever more of it is known."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.distributed import rank
from dd.devices import device_name
from dd.files import write_json

if TYPE_CHECKING:
    from dd.experiment import Experiment

RESULTS = "results.json"
#: What networks are trained on, in the order of the table.
TRAINING_SETS = ("random_real", "distilled", "full_data")


def empty_results(experiment: Experiment) -> dict[str, Any]:
    """The results of an experiment before anything was done, with all that describes it."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "status": "running",
        "dataset": experiment.dataset.name,
        "images_per_class": experiment.synthetic.images_per_class,
        "accuracy": dict.fromkeys(TRAINING_SETS),
        "network": type(experiment.network).__name__,
        # Tells widths apart: a set may be judged by another than it was distilled with.
        "network_parameters": sum(value.numel() for value in experiment.network.parameters()),
        "architectures": {},
        "scores": None,
        "protocol": experiment.evaluator.protocol.name,
        "selection": "validation split of the training data; test set used once",
        "seed": experiment.seed,
        "outer_steps": None,
        "wall_clock_seconds": {"distilling": 0.0, "evaluating": 0.0},
        "device": device_name(experiment.device),
        "versions": versions(),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results; of several processes the first one does."""
    if rank() == 0:
        write_json(path, results)


def versions() -> dict[str, str]:
    """Of Python, and of the packages that results depend on."""
    packages = ("torch", "torchvision", "torchopt", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
