"""Tiny runs: how every test of `dd` distils, by a command or in this process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd import config
from dd.data.prepared import PreparedData
from dd.distillation.loop import Distillation, Ready, begin, outer_loop
from dd.distillation.recorder import FolderRecorder
from dd.experiment import Experiment
from dd.runtime.files import read_json

GIN = Path(__file__).parents[1] / "gin"
OUTER_STEPS, INNER_STEPS, WINDOW = 6, 6, 3
#: A snapshot after the first outer step.
SNAPSHOT = Path("snapshots") / "0.0001_minutes.safetensors"
#: Of these, what only a recipe with real images in its outer loss and random windows refers to.
REAL_IMAGES: dict[str, Any] = {"RealImages.real_batch": 50, "RandomWindow.window": WINDOW}
#: What makes a distillation of digits one of a second.
TINY: dict[str, Any] = {
    **REAL_IMAGES,
    "Distiller.outer_steps": OUTER_STEPS,
    "Distiller.minutes": None,
    "Distiller.inner_steps": INNER_STEPS,
    "Distiller.compile": False,
    "Distiller.image_every": 2,
    "Distiller.snapshot_minutes": [1e-4],
    "ConvNet.width": 8,
    "ConvNet.depth": 1,
    "Evaluator.networks": 2,
    "Evaluator.steps": [5],
    "Evaluator.full_data_networks": 1,
    "Evaluator.full_data_steps": [5],
    "Evaluator.validation_steps": 5,
}


def bindings(*lines: str, **changes: Any) -> list[str]:
    """The gin bindings of a tiny run; in the names of `changes`, `__` stands for a dot."""
    values = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [*(f"{name} = {_gin(value)}" for name, value in values.items()), *lines]


def _gin(value: Any) -> str:
    """A value as gin reads it; a string that begins with @ is a reference."""
    return value if isinstance(value, str) and value.startswith("@") else repr(value)


def arguments(
    run_dir: Path | str | None, *lines: str, file: str = "digits.gin", **changes: Any
) -> list[str]:
    """The arguments of a command for a tiny run."""
    asked = {name.replace("__", ".") for name in changes}
    without = () if file == "digits.gin" else tuple({*REAL_IMAGES} - asked)
    words = [
        f"--gin_param={binding}"
        for binding in bindings(*lines, **changes)
        if binding.partition(" = ")[0] not in without
    ]
    where = [] if run_dir is None else [f"--run_dir={run_dir}"]
    return [f"--gin_file={GIN / file}", *where, *words]


def experiment(*lines: str, file: str = "digits.gin", **changes: Any) -> Experiment:
    """The experiment of a tiny run."""
    return config.load([str(GIN / file)], bindings(*lines, **changes))


def distil(
    made: Experiment, data: PreparedData, folder: Path, until: int | None = None
) -> Distillation:
    """Begin, or go on with, a run in `folder`: to its end, or to an outer step."""
    run = begin(made.distiller, made.task(data, folder))
    recorder = FolderRecorder(run, folder, "")
    try:
        for event in outer_loop(run):
            recorder.take(event)
            if isinstance(event, Ready) and event.step == until:
                break
        recorder.save()
    finally:
        recorder.close()
    return run


def process(cwd: Path, *words: str) -> subprocess.Popen[str]:
    """`python -m ...` in `cwd`, on one thread, with warnings as errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def command(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The same, finished."""
    running = process(cwd, *words)
    out, err = running.communicate(timeout=120)
    assert "Traceback" not in err
    assert "Warning" not in err
    return subprocess.CompletedProcess(words, running.returncode, out, err)


def run_command(module: Any, words: list[str]) -> int:
    """A command in this process, which spares the seconds that imports take; its exit status."""
    try:
        return int(module.main(words))
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "results.json")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but those that mark who writes to it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".writer.")
    }


def shown_in(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run, all of it."""
    kinds = ("scalars", "histograms", "images", "tensors")
    events = EventAccumulator(str(folder / "events"), size_guidance=dict.fromkeys(kinds, 0))
    return events.Reload()


def curve(shown: EventAccumulator, name: str) -> list[float]:
    """The values of a scalar, one for each outer step at which it was shown."""
    return [event.value for event in shown.Scalars(name)]


def steps_of(shown: EventAccumulator, name: str) -> list[int]:
    """The outer steps at which a scalar was shown."""
    return [event.step for event in shown.Scalars(name)]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed to stderr, which must be one line, beside progress bars."""
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.strip() and "%|" not in line]
    assert error.startswith("error: ")
    return error
