"""Wherever a run is killed, it goes on to the bits of one that was left alone."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import arguments

from dd import train
from dd.runtime.files import read_tensors

ROOT = Path(__file__).parents[2]
CHANGES: dict[str, Any] = {
    "Distiller__outer_steps": 3,
    "Distiller__validate_every": 2,
    "Distiller__average_decay": 0.5,
    "Distiller__checkpoint_seconds": 0.0,
    "RandomWindow__refresh": 2,
    "Evaluator__networks": 1,
    "Evaluator__steps": [1],
    "Evaluator__validation_networks": 1,
    "Evaluator__validation_steps": 1,
    "Evaluator__full_data_networks": 0,
}
FILES = ("checkpoint.safetensors", "distilled.safetensors")


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "kills.py")]
    options = "--kills 50 --steps 150 --after 0.5 --seed 1"
    done = subprocess.run(
        [*script, *options.split(), "--json", str(tmp_path / "kills.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "kills.json").read_text())["summary"]
    assert (summary["kills"], summary["tracebacks"]) == (50, 0)
    assert summary["tensors_with_other_bits"] == []
    assert summary["tensors_compared"] >= 5


@pytest.fixture
def killed(tmp_path: Path) -> Any:
    """Runs the command in a process of its own that is gone before a call; its exit status."""
    sys.path.insert(0, str(Path(__file__).parent))
    from crashing_train import crashing_train

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dd.config", "dd.train", "tensorboard", "matplotlib.pyplot"])

    def run(words: list[str], point: int) -> int | None:
        process = context.Process(target=crashing_train, args=(words, point, tmp_path / "calls"))
        process.start()
        process.join()
        return process.exitcode

    yield run
    sys.path.remove(str(Path(__file__).parent))


@pytest.mark.slow
def test_every_point_of_every_write(
    killed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert killed(arguments(tmp_path / "whole", **CHANGES), -1) == 0
    points = int((tmp_path / "calls").read_text())
    assert points > 80
    expected = {name: read_tensors(tmp_path / "whole" / name)[0] for name in FILES}
    for point in range(points):
        folder = tmp_path / str(point)
        words = arguments(folder, **CHANGES)
        assert killed(words, point) == 9
        assert train.main(words) == 0, (point, capsys.readouterr().err)
        for name, tensors in expected.items():
            found = read_tensors(folder / name)[0]
            assert found.keys() == tensors.keys(), (point, name)
            assert all(torch.equal(found[key], value) for key, value in tensors.items()), point
        assert not list(folder.rglob("*.unfinished"))
    assert "Traceback" not in capsys.readouterr().err
