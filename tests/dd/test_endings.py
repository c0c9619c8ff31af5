"""However a run ends, what it leaves is good, says how it ended, and can be gone on with."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import OUTER_STEPS, arguments, experiment, process, results_of

import bilevel
from dd import train
from dd.distillation import loop
from dd.distillation.loop import Distillation
from dd.evaluation.distilled_set import DistilledSet
from dd.runtime.files import read_json, read_tensors

Step = Callable[[Distillation], Any]
OFTEN = {"Distiller__checkpoint_seconds": 0.0}


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Distillation], None]], None]:
    """Have something done at the beginning of every outer step."""
    step: Step = loop.outer_step

    def do(what: Callable[[Distillation], None]) -> None:
        def outer_step(run: Distillation) -> Any:
            what(run)
            return step(run)

        monkeypatch.setattr(loop, "outer_step", outer_step)

    return do


def step_saved(folder: Path) -> int:
    return int(read_tensors(folder / "checkpoint.safetensors")[1]["step"])


def lines(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


# Errors.


@pytest.mark.parametrize(
    "error", [RuntimeError("it broke\nin two lines"), MemoryError(), KeyError()]
)
def test_an_error_leaves_all_steps_before_it_and_its_traceback(
    error: Exception, in_step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Distillation) -> None:
        if run.state.step == 3:
            raise error

    in_step(fail)
    folder = tmp_path / "run"
    assert train.main(arguments(folder)) == 1
    assert step_saved(folder) == 3
    results = results_of(folder)
    assert (results["status"], results["outer_steps"]) == ("failed", 3)
    assert type(error).__name__ in results["reason"]
    assert "process" not in results
    printed = lines(capsys)
    assert "Traceback" not in printed
    assert str(folder / "traceback.txt") in printed
    assert "test_endings.py" in (folder / "traceback.txt").read_text()
    advice = "out of memory: the largest part is"
    assert (advice in printed) == isinstance(error, MemoryError)


def test_an_error_in_the_middle_of_a_step_leaves_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half applied is not kept, so that a resumed run gives the bits of a whole one."""
    constrained = iter(range(10))
    constrain = loop.Distillation.candidate

    def fail(run: Distillation, name: str) -> DistilledSet:
        if next(constrained) == 2:
            raise RuntimeError("in a validation")
        return constrain(run, name)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Distillation, "candidate", fail)
        validating = arguments(
            tmp_path / "run", Distiller__validate_every=1, Distiller__snapshot_minutes=[]
        )
        assert train.main(validating) == 1
    assert step_saved(tmp_path / "run") == 0
    assert train.main(validating) == 0
    assert train.main([w.replace(f"{tmp_path}/run", f"{tmp_path}/whole") for w in validating]) == 0
    expected, found = (
        read_tensors(tmp_path / n / "checkpoint.safetensors")[0] for n in ("whole", "run")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("at", [0, 3])
def test_a_full_disk_is_told_and_spoils_nothing(
    at: int, in_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(run: Distillation) -> None:
        if run.state.step == at:
            monkeypatch.setattr(os, "fsync", full)

    in_step(fill)
    folder = tmp_path / "run"
    assert train.main(arguments(folder, **OFTEN)) == 2
    assert "No space left on device: '" in lines(capsys)
    monkeypatch.undo()
    assert step_saved(folder) == at
    assert results_of(folder)["status"] == "running"  # there was no room to say more
    assert not list(folder.rglob("*.unfinished"))
    assert train.main(arguments(folder)) == 0


def test_a_run_at_work_says_which_process_that_is(in_step: Any, tmp_path: Path) -> None:
    seen = []
    in_step(lambda run: seen.append(read_json(tmp_path / "run" / "results.json")))
    assert train.main(arguments(tmp_path / "run", Distiller__outer_steps=1)) == 0
    assert seen[0]["status"] == "running"
    assert seen[0]["process"]["pid"] == os.getpid()


# Divergence.


def diverge(run: Distillation, when: range) -> None:
    if run.state.step in when:
        raise bilevel.NonFiniteError("the hypergradient is not finite")


def test_a_diverging_run_ends_with_its_last_good_state(
    in_step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_step(lambda run: diverge(run, range(2, 100)))
    folder = tmp_path / "run"
    assert train.main(arguments(folder, **OFTEN, Distiller__outer_steps=30)) == 2
    results = results_of(folder)
    assert (results["status"], results["skipped_steps"]) == ("failed", 10)
    assert step_saved(folder) == 2
    assert "not finite" in results["reason"]


def test_a_diverging_run_goes_back_and_on_with_half_the_rates(
    in_step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_fast(run: Distillation) -> None:
        if run.state.rate_scale > 0.25:
            diverge(run, range(2, 100))

    in_step(too_fast)
    folder = tmp_path / "run"
    words = arguments(folder, **OFTEN, Distiller__outer_steps=14, Distiller__back_off=2)
    assert train.main(words) == 1
    printed = lines(capsys)
    assert printed.count("outer step 11: the run diverges and goes on from the point") == 2
    results = results_of(folder)
    assert (results["status"], results["skipped_steps"]) == ("diverged", 20)
    rates = results["distilled_set"]["outer_rates"]
    assert [entry["images"] for entry in rates] == [0.1, 0.025]
    assert [entry["after_outer_step"] for entry in rates] == [0, 2]


def test_a_set_that_is_not_finite_is_never_saved(
    in_step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(run: Distillation) -> None:
        if run.state.step == 3:
            run.state.optimizer.param_groups[0]["lr"] = float("inf")

    in_step(explode)
    folder = tmp_path / "run"
    assert train.main(arguments(folder, **OFTEN)) == 2
    assert "made images non-finite" in lines(capsys)
    assert step_saved(folder) == 3
    for name in ("checkpoint.safetensors", "distilled.safetensors"):
        tensors = read_tensors(folder / name)[0].values()
        assert all(bool(value.isfinite().all()) for value in tensors)
    made = experiment()
    state = made.distiller.initial_state(made.task(made.prepare(), folder))
    state.outer["images"].data.fill_(float("nan"))
    with pytest.raises(bilevel.NonFiniteError):
        state.save(folder / "checkpoint.safetensors")
    assert step_saved(folder) == 3


def test_a_run_that_skips_too_much_is_not_called_complete(
    in_step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_step(lambda run: diverge(run, range(2, 3)))
    folder = tmp_path / "run"
    assert train.main(arguments(folder)) == 1
    assert results_of(folder)["status"] == "diverged"
    assert "1 of 6 outer steps were skipped" in lines(capsys)
    assert train.main(arguments(folder, Distiller__outer_steps=12)) == 0
    results = results_of(folder)
    assert (results["status"], results["skipped_steps"]) == ("complete", 1)


def test_rates_may_change_when_a_run_is_resumed_and_the_set_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main(arguments(folder, Distiller__outer_steps=2)) == 0
    assert "outer_rates" not in results_of(folder)["distilled_set"]
    assert train.main(arguments(folder, Distiller__outer_steps=4, Distiller__image_lr=0.01)) == 0
    assert "other outer learning rates after outer step 2" in lines(capsys)
    rates = results_of(folder)["distilled_set"]["outer_rates"]
    assert rates == [
        {"after_outer_step": 0, "images": 0.1},
        {"after_outer_step": 2, "images": 0.01},
    ]


# Signals and pipes, by the command.


def wait_for(path: Path, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step(number: signal.Signals, tmp_path: Path) -> None:
    words = arguments("run", Distiller__outer_steps=10**6)
    with process(tmp_path, "dd.train", *words) as running:
        wait_for(tmp_path / "run" / "snapshots", running)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    results = results_of(tmp_path / "run")
    assert results["status"] == "interrupted"
    assert results["outer_steps"] == step_saved(tmp_path / "run") >= 1


@pytest.mark.slow
def test_a_closed_terminal_ends_no_run(tmp_path: Path) -> None:
    with process(tmp_path, "dd.train", *arguments("run")) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        while "writing to" not in running.stdout.readline():
            pass
        running.stdout.close()
        running.stderr.close()
        assert running.wait(timeout=100) in (0, 1, 2)
    assert step_saved(tmp_path / "run") == OUTER_STEPS
    assert results_of(tmp_path / "run")["status"] in ("complete", "failed")
    assert train.main(arguments(tmp_path / "run")) == 0
