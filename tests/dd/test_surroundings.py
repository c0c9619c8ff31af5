"""What a command is started in: signals at odd moments, terminals of few letters, limits."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import arguments, one_error

from dd import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, shells and limits of Unix")
#: Beside the command that is tested: Python imports it when it starts.
AS_TORCH_IS_IMPORTED = """
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
"""


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def started(
    folder: Path, words: list[str], shell: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command, perhaps behind a shell's redirections; warnings are errors."""
    line = [sys.executable, "-W", "error", "-m", *words]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *line],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["dd.train", "--gin_file=digits"],
        ["dd.evaluate", "run"],
        ["dd.evaluate", "run", "--compare=other"],
        ["dd.experts", "--gin_file=digits"],
        ["dd.export", "run"],
        ["dd.sweep", "--gin_file=digits", "--sweep_dir=sweep"],
    ],
    ids=lambda words: " ".join(words[:1]),
)
def test_an_interrupt_while_modules_are_imported_is_one_line(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AS_TORCH_IS_IMPORTED)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = started(tmp_path, words, PYTHONPATH=path)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted\n")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, slow(signal.SIGINT), slow(getattr(signal, "SIGHUP", 1))]
)
def test_a_signal_before_anything_is_begun_is_one_line(
    number: signal.Signals, tmp_path: Path
) -> None:
    killing = f"import os\nos.kill(os.getpid(), {int(number)})\n"
    (tmp_path / "killing.py").write_text(killing)
    ended = started(tmp_path, ["dd.train", "--gin_file=digits", "--import=killing"])
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("shell", [slow(">&-"), slow("<&-"), ">&- <&-"])
def test_closed_streams_end_no_command(shell: str, tmp_path: Path) -> None:
    ended = started(tmp_path, ["dd.export", "digits-ipc1", "--format=npz"], shell)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "digits-ipc1-npz").is_dir()


@pytest.mark.parametrize(
    "words", [["dd.evaluate", "--help"], slow(["dd.export", "digits-ipc1", "--out=Bücher"])]
)
def test_letters_that_a_terminal_has_not_end_no_command(words: list[str], tmp_path: Path) -> None:
    ended = started(tmp_path, words, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\\" in ended.stdout


def test_a_folder_whose_name_is_no_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments(str(tmp_path / os.fsdecode(b"b\xff")))) == 2
    assert one_error(capsys).endswith("is no UTF-8: choose another name")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocks", [slow(8), slow(32)])
def test_a_file_that_may_not_grow_is_one_line_and_no_traceback(blocks: int, tmp_path: Path) -> None:
    words = arguments("run", Distiller__outer_steps=20, Evaluator__full_data_networks=0)
    line = 'ulimit -f "$0" && exec "$@"'
    ended = subprocess.run(
        ["sh", "-c", line, str(blocks), sys.executable, "-m", "dd.train", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2
    errors = [line for line in ended.stderr.splitlines() if "%|" not in line and line.strip()]
    assert "Traceback" not in ended.stderr
    assert errors[-1].startswith("error: ")
    assert "run" in errors[-1]
    assert "File too large" in errors[-1]
