"""A process that is stopped, or hangs, is noticed by the others, which save and end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import arguments, results_of
from torch import distributed

from bilevel.heartbeat import Heartbeat
from dd.runtime.files import read_tensors

SILENT = Path(__file__).with_name("silent_train.py")


def eventually(holds: object) -> None:
    assert callable(holds)
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_is_silent_and_who_is_behind_is_heard() -> None:
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    mine, other = (Heartbeat("localhost", store.port, rank, 2, 1.0) for rank in range(2))
    mine.arrive()
    assert mine.behind() == [1]
    other.arrive()
    eventually(lambda: mine.behind() == [])
    eventually(lambda: mine.silent() == [])
    other.stop()
    eventually(lambda: mine.silent() == [1])
    mine.stop()


def started(folder: Path, rank: int, how: str, patience: float) -> subprocess.Popen[str]:
    """Two processes that distil, of which one is silent from its fourth step on."""
    words = arguments(
        "run", Distiller__patience_seconds=patience, Distiller__snapshot_minutes=[1e-9]
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    told = {"OMP_NUM_THREADS": "1", "SILENT_RANK": str(rank), "SILENT_HOW": how}
    return subprocess.Popen(
        [*launcher, "--nproc_per_node=2", str(SILENT), *words],
        cwd=folder,
        env={**os.environ, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(1, "stopped"), (0, "stopped"), (1, "hanging")])
def test_a_silent_process_is_noticed_and_the_other_saves(
    rank: int, how: str, tmp_path: Path
) -> None:
    """Before it there was only the checkpoint of the start."""
    with started(tmp_path, rank, how, 10.0) as running:
        # Most of it is torchrun's, which kills a stopped process after half a minute.
        _, err = running.communicate(timeout=150)
    assert running.returncode != 0
    assert f"process {rank} " in err
    assert ("heard nothing of" if how == "stopped" else "has waited for") in err
    assert read_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 3
    results = results_of(tmp_path / "run")
    # A first process that is stopped cannot write any more.
    assert results["status"] == ("running" if rank == 0 else "failed")
    assert rank == 0 or "SilentProcessError" in results["reason"]


@pytest.mark.slow
def test_ctrl_c_ends_a_wait_for_a_silent_process(tmp_path: Path) -> None:
    with started(tmp_path, 1, "stopped", 600.0) as running:
        eventually((tmp_path / "run" / "snapshots").exists)
        time.sleep(3)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=100)
    assert running.returncode != 0
    assert read_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 3
    assert results_of(tmp_path / "run")["status"] in ("failed", "interrupted")
