"""The commands in several processes: one run, as if one process had done all of it."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import OUTER_STEPS, arguments, curve, experiment, results_of, shown_in, steps_of

import bilevel
from dd import train
from dd.data.prepared import RealBatches
from dd.evaluation.distilled_set import DistilledSet
from dd.objectives.real_images import MetaLoss
from dd.runtime import devices
from dd.runtime.files import read_tensors

FAILING = Path(__file__).with_name("failing_train.py")
CHANGES: dict[str, Any] = {
    "Distiller__validate_every": 3,
    # So that the schedule has a state, and the failure comes between two draws.
    "RandomWindow__refresh": 2,
    "Evaluator__networks": 3,
    "Evaluator__steps": [5, 10],
    "Evaluator__validation_networks": 3,
}


def words(*lines: str, **changes: Any) -> list[str]:
    """The arguments of a tiny run in the folder `run`."""
    return arguments("run", *lines, **CHANGES, **changes)


def two_processes(cwd: Path, *words: str) -> subprocess.Popen[str]:
    """`torchrun --nproc_per_node=2 …` in `cwd`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc_per_node=2", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def scalars(folder: Path, name: str) -> dict[int, float]:
    """The values of a scalar by step; a step that was shown twice is an error."""
    shown = shown_in(folder)
    found = list(zip(steps_of(shown, name), curve(shown, name), strict=True))
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, bytes]:
    """The folder of a run whose process 1 failed, its status and stderr, and its checkpoint."""
    cwd = tmp_path_factory.mktemp("two")
    running = two_processes(cwd, str(FAILING), *words())
    _, err = running.communicate(timeout=400)
    checkpoint = (cwd / "run" / "checkpoint.safetensors").read_bytes()
    return cwd / "run", running.returncode, err, checkpoint


@pytest.fixture(scope="module")
def finished(failed: tuple[Path, int, str, bytes]) -> tuple[Path, str]:
    """The same run after it was resumed and finished in two processes, and what it printed."""
    folder = failed[0]
    running = two_processes(folder.parent, "-m", "dd.train", *words())
    out, err = running.communicate(timeout=400)
    assert running.returncode == 0, err
    assert "Traceback" not in err
    return folder, out


@pytest.fixture
def run_copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@dataclass
class Reference:
    """What every outer step, counted from 1, leads to."""

    images: dict[int, torch.Tensor] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)


@pytest.fixture(scope="module")
def in_one_process() -> Reference:
    """The run as one process does it that averages over the draws of both."""
    whole = experiment(**CHANGES)
    settings, data, found = whole.distiller, whole.prepare(), Reference()
    outer = whole.synthetic.create(
        data.train_images, data.train_labels, data.num_classes, whole.key.generator("synthetic")
    )
    images = outer["images"]
    optimizer, clip = torch.optim.Adam([images], lr=settings.image_lr), settings.clip
    assert clip is not None
    schedules = [settings.truncation, copy.deepcopy(settings.truncation)]
    problem = MetaLoss(whole.network, whole.synthetic, whole.augmentation, whole.device)
    hypergradients = [
        bilevel.Hypergradient(problem, settings.optimizer, settings.inner_steps, schedule)
        for schedule in schedules
    ]
    keys = [whole.key, whole.key.fold("process", 1)]
    real = [
        RealBatches(data.train_images, data.train_labels, 50, whole.augmentation, key.fold("real"))
        for key in keys
    ]
    for step in range(1, OUTER_STEPS + 1):
        results = [
            hypergradient(outer, batches.at(step - 1), key.generator("outer", step - 1))
            for hypergradient, key, batches in zip(hypergradients, keys, real, strict=True)
        ]
        schedules[1].load_state_dict(schedules[0].state_dict())
        images.grad = torch.stack([result.grads["images"] for result in results]).mean(0)
        found.losses[step] = sum(float(result.loss) for result in results) / 2
        found.norms[step] = float(images.grad.norm())
        clip([images])
        optimizer.step()
        found.images[step] = images.detach().clone()
        if step % 3 == 0:
            found.validation[step] = whole.evaluator.validation(
                images,
                whole.synthetic.labels(outer),
                whole.network,
                data,
                whole.key.fold("validation", step),
            )
    return found


def test_a_process_that_fails_ends_the_job_and_says_why(
    failed: tuple[Path, int, str, bytes],
) -> None:
    _, status, err, _ = failed
    assert status != 0
    assert "RuntimeError: the fourth step is too much" in err


def test_it_leaves_a_checkpoint_of_the_last_whole_step(
    failed: tuple[Path, int, str, bytes],
    in_one_process: Reference,
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(failed[3])
    tensors, metadata = read_tensors(path)
    assert metadata["step"] == 3
    assert metadata["processes"] == 2
    expected = in_one_process.images[3]
    torch.testing.assert_close(tensors["outer.images"], expected, rtol=1e-6, atol=1e-6)


def test_two_processes_learn_what_one_learns_from_both_their_draws(
    finished: tuple[Path, str], in_one_process: Reference
) -> None:
    tensors, metadata = read_tensors(finished[0] / "checkpoint.safetensors")
    assert metadata["step"] == OUTER_STEPS
    expected = in_one_process.images[OUTER_STEPS]
    torch.testing.assert_close(tensors["outer.images"], expected, rtol=1e-6, atol=1e-6)


def test_networks_are_judged_as_by_one_process(finished: tuple[Path, str], tmp_path: Path) -> None:
    whole = experiment(**CHANGES)
    alone = whole.evaluate(finished[0] / "distilled.safetensors", tmp_path / "alone.json")
    results = results_of(finished[0])
    assert results["status"] == "complete"
    assert results["accuracy"] == alone.as_dict()["accuracy"]
    assert [results["accuracy"][name]["networks"] for name in results["accuracy"]] == [3, 3, 1]


def test_only_the_first_process_writes(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "checkpoint.safetensors",
        "checkpoint.previous.safetensors",
        "config.gin",
        "confusion.png",
        "distilled.png",
        "distilled.safetensors",
        "events",
        "results.json",
        "snapshots",
        "traceback.txt",  # of the failure before
    }
    # One file of events for each of the two commands, and one for the result.
    assert len(list((folder / "events").iterdir())) == 3
    assert list(scalars(folder, "outer/loss")) == list(range(1, OUTER_STEPS + 1))
    for words in ("resuming the run", "preparing", "test accuracy on digits"):
        assert printed.count(words) == 1
    provenance = DistilledSet.load(folder / "distilled.safetensors").provenance
    assert provenance["processes"] == 2


def test_what_is_shown_is_the_average(
    finished: tuple[Path, str], in_one_process: Reference
) -> None:
    for name, expected in (
        ("outer/loss", in_one_process.losses),
        ("hypergradient/norm", in_one_process.norms),
        ("validation/accuracy", in_one_process.validation),
    ):
        assert scalars(finished[0], name) == pytest.approx(expected, rel=1e-5)


def test_one_process_can_go_on_where_two_stopped(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = arguments(run_copy, **CHANGES, Distiller__outer_steps=OUTER_STEPS + 1)
    assert train.main(more) == 0
    assert "this run had 2 processes and goes on with 1" in capsys.readouterr().err
    _, metadata = read_tensors(run_copy / "checkpoint.safetensors")
    assert metadata["processes"] == 1
    assert results_of(run_copy)["outer_steps"] == OUTER_STEPS + 1


@pytest.mark.slow
def test_stages_are_those_of_the_first_process(tmp_path: Path) -> None:
    """Its held-out accuracy ends them, in both, each once and in order."""
    stages = [
        "Distiller.truncation = @StageAware()",
        "StageAware.window = 3",
        "StageAware.width_range = 1",
        "StageAware.transition = @ByMetric()",
        "ByMetric.gain = (9.0, 9.0)",
        "ByMetric.patience = (1, 1)",
        "ByMetric.block = 1",
    ]
    running = two_processes(tmp_path, "-m", "dd.train", *words(*stages))
    _, err = running.communicate(timeout=400)
    assert running.returncode == 0, err
    assert err.count("the early stage ends") == err.count("the middle stage ends") == 1
    shown = scalars(tmp_path / "run", "schedule/stage")
    assert sorted(shown.values()) == [*shown.values()]
    assert set(shown.values()) == {0, 1, 2}


@pytest.mark.slow
def test_a_signal_stops_both_after_the_same_step(tmp_path: Path) -> None:
    running = two_processes(tmp_path, "-m", "dd.train", *words(Distiller__outer_steps=10**6))
    folder = tmp_path / "run"
    try:
        deadline = time.monotonic() + 100
        while not (folder / "snapshots").exists():
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        # torchrun would kill them after 30 seconds.
        _, err = running.communicate(timeout=25)
    finally:
        running.kill()
    assert err.count("stopping after this step") == 1
    assert not re.search("^error", err, re.MULTILINE)
    results = results_of(folder)
    assert results["status"] == "interrupted"
    _, metadata = read_tensors(folder / "checkpoint.safetensors")
    assert results["outer_steps"] == metadata["step"] >= 1


@pytest.mark.slow
def test_evaluate_shares_the_networks_out(run_copy: Path) -> None:
    expected = results_of(run_copy)["accuracy"]
    running = two_processes(run_copy.parent, "-m", "dd.evaluate", "run")
    out, err = running.communicate(timeout=400)
    assert running.returncode == 0, err
    assert results_of(run_copy)["accuracy"] == expected
    assert out.count("test accuracy on digits") == 1


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    running = two_processes(tmp_path, "-m", "dd.train", *words(RandomWindow__windw=3))
    _, err = running.communicate(timeout=400)
    assert running.returncode != 0
    assert err.count("RandomWindow has no parameter 'windw'") == 1
    assert list(tmp_path.iterdir()) == []


# Devices, which this machine need not have.


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As in process 1 of 2 on a machine with two GPUs; the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_every_process_has_its_own_gpu(name: str, second_of_two: list[torch.device]) -> None:
    assert devices.chosen_device(name) == torch.device("cuda:1")
    assert second_of_two == [torch.device("cuda:1")]


def test_gpus_that_are_not_there_or_not_to_be_shared_are_refused(
    second_of_two: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices.chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device='cuda:0': 2 processes cannot share one GPU"):
        devices.chosen_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"process 1 of this machine .* start 1 with"):
        devices.chosen_device("auto")
