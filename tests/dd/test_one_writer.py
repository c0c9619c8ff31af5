"""A run directory, or a buffer of experts, has one writer; what a dead one left is cleared away."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import arguments, contents, one_error

from dd import evaluate, experts, train
from dd.runtime.writer import FolderInUseError, only_writer

#: Holds a folder until its input is closed.
HOLDING = """
import sys
from pathlib import Path
from dd.runtime.writer import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
EXPERTS = {
    "Experiment__dataset": "@digits()",
    "Experts__count": 1,
    "Experts__snapshots": 4,
    "MatchExperts__max_start": 3,
}


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another program that writes to the folder `held`."""
    running = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "held")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "held\n"
    yield running
    running.kill()
    running.communicate()


def test_the_second_writer_is_told_who_the_first_is(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held"
    before = contents(held)
    assert train.main(arguments(held)) == 2
    message = one_error(capsys)
    assert f"{held} is in use: process {holder.pid} on " in message
    buffer = arguments(None, file="cifar10_att_cpu.gin", **EXPERTS, Experts__folder=str(held))
    assert experts.main(buffer) == 2
    assert f"{held} is in use: process {holder.pid} on " in one_error(capsys)
    assert contents(held) == before


def test_the_lock_of_a_dead_process_does_not_block(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    held = tmp_path / "held"
    with pytest.raises(FolderInUseError), only_writer(held):
        pass
    holder.send_signal(signal.SIGTERM)
    holder.wait()
    assert (held / ".writer.json").exists()
    with only_writer(held):
        pass


def test_a_run_is_judged_while_it_goes_on_but_not_over_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main(arguments(folder, Distiller__outer_steps=1)) == 0
    with only_writer(folder):
        capsys.readouterr()
        assert evaluate.main([str(folder)]) == 2
        assert "is in use" in one_error(capsys)
        assert evaluate.main([str(folder), "--only=distilled"]) == 0


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "snapshots" / "average.safetensors"
    killed = "import os; from pathlib import Path; from dd.runtime.files import write_text\n"
    killed += f"os.replace = lambda *_: os._exit(1)\nwrite_text(Path({str(path)!r}), 'x')"
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 1
    (tmp_path / "run" / ".mine").write_text("a file of the user's")
    assert len(contents(tmp_path / "run")) == 2
    with only_writer(tmp_path / "run"):
        assert set(contents(tmp_path / "run")) == {".mine"}
