"""The commands as a user runs them: what they print, write, survive and refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd import config, evaluate, train
from dd.distillation.loop import Distillation
from dd.evaluation.distilled_set import DistilledSet
from dd.runtime.files import read_tensors

DIGITS = Path(__file__).parents[2] / "gin" / "digits.gin"
INNER_STEPS, WINDOW, OUTER_STEPS = 6, 3, 6
TINY = {
    "Distiller.outer_steps": OUTER_STEPS,
    "Distiller.inner_steps": INNER_STEPS,
    "Distiller.real_batch": 50,
    "Distiller.image_every": 2,
    # A snapshot after the first step.
    "Distiller.snapshot_minutes": [1e-4],
    "RandomWindow.window": WINDOW,
    "ConvNet.width": 8,
    "ConvNet.depth": 1,
    "Evaluator.networks": 2,
    "Evaluator.steps": [5],
    "Evaluator.full_data_networks": 1,
    "Evaluator.full_data_steps": [5],
}
SNAPSHOT = Path("snapshots") / "0.0001_minutes.safetensors"


def arguments(run_dir: Path | str, **changes: Any) -> list[str]:
    """The arguments of a tiny run; in `changes`, `__` stands for a dot."""
    bindings = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    parameters = [f"--gin_param={name} = {value!r}" for name, value in bindings.items()]
    return [f"--gin_file={DIGITS}", f"--run_dir={run_dir}", *parameters]


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


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, list[str]], int]:
    """Runs a command's main in this process, which spares the seconds that imports take."""
    for module in (train, evaluate):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: True)

    def run(module: Any, words: list[str]) -> int:
        try:
            return int(module.main(words))
        except SystemExit as stop:  # argparse
            return int(stop.code or 0)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed to stderr, which must be one line."""
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


def outer(folder: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_tensors(folder / "checkpoint.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("outer.")}


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(folder / "events"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return accumulator.Reload()


def steps_of(accumulator: EventAccumulator, name: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(name)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, and what was printed; tests copy it before they change it."""
    cwd = tmp_path_factory.mktemp("finished")
    done = command(cwd, "dd.train", *arguments("run"))
    assert done.returncode == 0, done.stderr
    return cwd / "run", done.stdout


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


# A run.


def test_a_run_leaves_what_it_promises(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.safetensors",
        "distilled.png",
        "config.gin",
        "distilled.safetensors",
        "events",
        "results.json",
        "snapshots",
    }
    assert (folder / SNAPSHOT).is_file()


def test_the_table_shows_the_results(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    results = results_of(folder)
    assert "1 image per class" in printed
    for name in ("random_real", "distilled", "full_data"):
        accuracy = results["accuracy"][name]
        row = next(line for line in printed.splitlines() if line.startswith(name.replace("_", " ")))
        mean, std, networks, steps = re.findall(r"[\d.]+", row)
        assert float(mean) == pytest.approx(100 * accuracy["mean"], abs=0.051)
        assert float(std) == pytest.approx(100 * accuracy["std"], abs=0.051)
        assert (int(networks), int(steps)) == (accuracy["networks"], accuracy["steps"])
    assert str(Path("run") / "distilled.safetensors") in printed


def check_accuracies(results: dict[str, Any], networks: dict[str, int]) -> None:
    assert set(results["accuracy"]) == set(networks)
    for name, count in networks.items():
        accuracy = results["accuracy"][name]
        values = torch.tensor(accuracy["values"], dtype=torch.float64)
        assert accuracy["networks"] == len(values) == count
        assert bool(((values >= 0) & (values <= 1)).all())
        assert accuracy["mean"] == pytest.approx(float(values.mean()))
        assert accuracy["std"] == pytest.approx(float(values.std()) if count > 1 else 0.0)
        assert accuracy["steps"] == 5


def test_results_follow_their_schema(finished: tuple[Path, str]) -> None:
    results = results_of(finished[0])
    check_accuracies(results, {"random_real": 2, "distilled": 2, "full_data": 1})
    assert results["status"] == "complete"
    assert "-m dd.train --gin_file=" in results["command"]
    assert results["dataset"] == "digits"
    assert results["images_per_class"] == 1
    assert results["protocol"] == "bptt"
    assert "validation" in results["selection"]
    assert results["seed"] == 0
    assert results["outer_steps"] == OUTER_STEPS
    assert results["wall_clock_seconds"]["distilling"] > 0
    assert results["wall_clock_seconds"]["evaluating"] > 0
    assert results["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert results["versions"]["python"] == sys.version.split()[0]


def test_tensorboard_shows_every_step(finished: tuple[Path, str]) -> None:
    shown = events(finished[0])
    every = list(range(1, OUTER_STEPS + 1))
    for name in ("window/start", "window/stop", "hypergradient/norm", "outer/loss"):
        assert steps_of(shown, name) == every
    starts = [event.value for event in shown.Scalars("window/start")]
    stops = [event.value for event in shown.Scalars("window/stop")]
    assert all(
        start >= 0 and stop <= INNER_STEPS for start, stop in zip(starts, stops, strict=True)
    )
    assert {stop - start for start, stop in zip(starts, stops, strict=True)} == {WINDOW}
    assert len(set(starts)) > 1
    assert all(event.value > 0 for event in shown.Scalars("hypergradient/norm"))
    assert all(0 <= event.value <= 1 for event in shown.Scalars("outer/accuracy"))


def test_the_clipping_bound_follows_the_average_norm_of_all_steps(
    finished: tuple[Path, str],
) -> None:
    shown = events(finished[0])
    norms = [event.value for event in shown.Scalars("hypergradient/norm")]
    bounds = [event.value for event in shown.Scalars("hypergradient/clip_bound")]
    average = norms[0]
    for norm, bound in zip(norms, bounds, strict=True):
        average = 0.9 * average + 0.1 * norm
        assert bound == pytest.approx(2 * average, rel=1e-5)


def test_tensorboard_shows_the_configuration(finished: tuple[Path, str]) -> None:
    (event,) = events(finished[0]).Tensors("config/text_summary")
    shown = event.tensor_proto.string_val[0].decode()
    for line in (finished[0] / "config.gin").read_text().splitlines():
        assert line in shown
    assert "RandomWindow.window = 3" in shown


def test_tensorboard_shows_the_images(finished: tuple[Path, str]) -> None:
    shown = events(finished[0])
    for name in ("synthetic_images/clamped", "synthetic_images/stretched"):
        pictures = shown.Images(name)
        assert {picture.step for picture in pictures} == {0, 2, 4, 6}
        for picture in pictures:
            assert picture.encoded_image_string.startswith(b"\x89PNG")
            # Two rows of five digits of 8×8 pixels, enlarged to 64×64, with borders of 2.
            assert (picture.width, picture.height) == (5 * 66 + 2, 2 * 66 + 2)


def test_the_distilled_set_carries_the_fitted_transform(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    distilled = DistilledSet.load(folder / "distilled.safetensors")
    assert distilled.images.shape == (10, 1, 8, 8)
    assert distilled.labels.tolist() == list(range(10))
    assert distilled.class_names == tuple("0123456789")
    assert distilled.provenance["outer_step"] == OUTER_STEPS
    assert torch.equal(distilled.images, outer(folder)["outer.images"])
    fitted = config.load([str(folder / "config.gin")], []).prepare().transform
    assert distilled.transform.kind == fitted.kind
    for name, value in fitted.state().items():
        torch.testing.assert_close(distilled.transform.state()[name], value)


def test_the_snapshot_is_of_the_step_it_was_taken_at(finished: tuple[Path, str]) -> None:
    snapshot = DistilledSet.load(finished[0] / SNAPSHOT)
    assert snapshot.provenance["outer_step"] == 1
    final = DistilledSet.load(finished[0] / "distilled.safetensors")
    assert not torch.equal(snapshot.images, final.images)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    finished: tuple[Path, str], tmp_path: Path, here: Callable[..., int]
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert here(train, arguments(tmp_path / name, Experiment__seed=seed)) == 0
    first, same, other = (
        DistilledSet.load(folder / "distilled.safetensors").images
        for folder in (finished[0], tmp_path / "same", tmp_path / "other")
    )
    assert torch.equal(first, same)
    # Six steps of 0.02 cannot lead so far apart from one start.
    assert float((first - other).abs().max()) > 1
    accuracy = results_of(finished[0])["accuracy"]
    assert results_of(tmp_path / "same")["accuracy"] == accuracy
    assert results_of(tmp_path / "other")["accuracy"] != accuracy


# Going on.


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of 3 steps that was then continued to 6, and what was printed."""
    cwd = tmp_path_factory.mktemp("resumed")
    half = command(cwd, "dd.train", *arguments("run", Distiller__outer_steps=3))
    assert half.returncode == 0, half.stderr
    done = command(cwd, "dd.train", *arguments("run"))
    assert done.returncode == 0, done.stderr
    return cwd / "run", done.stdout


def test_a_resumed_run_equals_an_uninterrupted_one(
    finished: tuple[Path, str], resumed: tuple[Path, str]
) -> None:
    assert "resuming the run in run" in resumed[1]
    uninterrupted = outer(finished[0])
    assert set(uninterrupted) == {"outer.images"}
    assert torch.equal(outer(resumed[0])["outer.images"], uninterrupted["outer.images"])
    expected, found = results_of(finished[0]), results_of(resumed[0])
    assert found["outer_steps"] == OUTER_STEPS
    assert found["accuracy"] == expected["accuracy"]


def test_a_run_that_dies_in_its_first_steps_can_be_resumed(
    finished: tuple[Path, str],
    tmp_path: Path,
    here: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, steps = Distillation._step, iter(range(OUTER_STEPS))

    def dying_step(self: Distillation, *rest: Any) -> None:
        if next(steps) == 2:
            raise MemoryError
        step(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "_step", dying_step)
        with pytest.raises(MemoryError):
            here(train, arguments(tmp_path / "run"))
    assert here(train, arguments(tmp_path / "run")) == 0
    assert torch.equal(outer(tmp_path / "run")["outer.images"], outer(finished[0])["outer.images"])
    shown = events(tmp_path / "run")
    assert steps_of(shown, "outer/loss") == list(range(1, OUTER_STEPS + 1))


def test_tensorboard_of_a_resumed_run_shows_every_step_once(resumed: tuple[Path, str]) -> None:
    shown = events(resumed[0])
    for name in ("window/start", "outer/loss"):
        assert steps_of(shown, name) == list(range(1, OUTER_STEPS + 1))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"RandomWindow__window": 2}, "RandomWindow.window was 3, now 2"),
        ({"Experiment__seed": 1}, "Experiment.seed was 0, now 1"),
        ({"ConvNet__width": 9}, "ConvNet.width was 8, now 9"),
    ],
)
def test_resuming_with_another_configuration_is_refused(
    changes: dict[str, int],
    name: str,
    copy: Path,
    here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(copy)
    assert here(train, arguments(copy, Distiller__outer_steps=9, **changes)) == 2
    message = one_error(capsys)
    assert name in message
    assert str(copy) in message
    assert contents(copy) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_overwritten(
    damage: str, copy: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "checkpoint.safetensors"
    good = path.read_bytes()
    path.write_bytes({"truncated": good[:-10], "empty": b"", "foreign": b"PK\3\4 a zip"}[damage])
    before = contents(copy)
    assert here(train, arguments(copy, Distiller__outer_steps=9)) == 2
    assert str(path) in one_error(capsys)
    assert contents(copy) == before


def test_a_checkpoint_without_its_configuration_is_refused(
    copy: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "config.gin").unlink()
    before = contents(copy)
    assert here(train, arguments(copy)) == 2
    assert "config.gin" in one_error(capsys)
    assert contents(copy) == before


# Stopping.


def stopped_by(
    number: signal.Signals, cwd: Path, ready: Callable[[Path], bool], **changes: Any
) -> tuple[int, str]:
    """Start a long run, send a signal once its folder is `ready`; the exit status and stderr."""
    running = process(cwd, "dd.train", *arguments("run", **changes))
    try:
        deadline = time.monotonic() + 60
        while not ready(cwd / "run"):
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(number)
        _, err = running.communicate(timeout=15)
    finally:
        running.kill()
    return running.returncode, err


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_a_run_that_can_go_on(
    number: signal.Signals, tmp_path: Path, here: Callable[..., int]
) -> None:
    folder = tmp_path / "run"
    status, err = stopped_by(
        number, tmp_path, lambda run: (run / SNAPSHOT).exists(), Distiller__outer_steps=10**6
    )
    assert status == 130, err
    assert "Traceback" not in err
    results = results_of(folder)
    assert results["status"] == "interrupted"
    _, metadata = read_tensors(folder / "checkpoint.safetensors")
    steps = metadata["step"]
    assert results["outer_steps"] == steps >= 1
    distilled = DistilledSet.load(folder / "distilled.safetensors")
    assert distilled.provenance["outer_step"] == steps
    assert torch.equal(distilled.images, outer(folder)["outer.images"])

    assert here(train, arguments(folder, Distiller__outer_steps=steps + 2)) == 0
    results = results_of(folder)
    assert results["status"] == "complete"
    assert results["outer_steps"] == steps + 2


@pytest.mark.slow
def test_a_signal_stops_an_evaluation(tmp_path: Path) -> None:
    def evaluating(run: Path) -> bool:
        return (run / "results.json").exists() and (
            results_of(run)["accuracy"]["distilled"] is not None
        )

    status, err = stopped_by(
        signal.SIGINT, tmp_path, evaluating, Evaluator__full_data_steps=[10**6]
    )
    assert status == 130, err
    assert "Traceback" not in err
    results = results_of(tmp_path / "run")
    assert results["status"] == "interrupted"
    assert 0 <= results["accuracy"]["distilled"]["mean"] <= 1


# Mistakes.


def test_a_misspelt_parameter_is_one_line(tmp_path: Path) -> None:
    done = command(tmp_path, "dd.train", *arguments("run", RandomWindow__windw=3))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: RandomWindow has no parameter 'windw'; did you mean 'window'?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_one_line(
    tmp_path: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(DIGITS.with_name("digit.gin"))
    assert here(train, [f"--gin_file={missing}", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert f"{missing} does not exist" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"SyntheticDataset__start": "real", "SyntheticDataset__images_per_class": 500},
        {"Experiment__validation_fraction": 0.9999},
        {"Experiment__validation_fraction": 1.5},
    ],
    ids=str,
)
def test_what_the_data_cannot_give_is_one_line(
    changes: dict[str, Any],
    tmp_path: Path,
    here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert here(train, arguments(tmp_path / "run", **changes)) == 2
    assert list(changes)[-1].split("__")[1] in one_error(capsys)


PACED = [
    "--gin_param=Distiller.objective = @RealImages()",
    "--gin_param=RealImages.pacing = @DifficultyPacing()",
    "--gin_param=DifficultyPacing.over_steps = 4",
    "--gin_param=DifficultyPacing.networks = 1",
    "--gin_param=DifficultyPacing.epochs = 1",
]


def test_real_images_can_be_paced_by_difficulty(
    tmp_path: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(train, [*arguments(tmp_path / "run"), *PACED]) == 0
    assert "scoring real images" in capsys.readouterr().err
    assert results_of(tmp_path / "run")["status"] == "complete"
    more = [*arguments(tmp_path / "run", Distiller__outer_steps=OUTER_STEPS + 1), *PACED]
    assert here(train, more) == 0
    # The scores are kept, so that a resumed run draws from the same images.
    assert "scoring real images" not in capsys.readouterr().err
    (tmp_path / "run" / "difficulty.safetensors").write_bytes(b"{")
    before = results_of(tmp_path / "run")
    assert here(train, [*arguments(tmp_path / "run", Distiller__outer_steps=99), *PACED]) == 2
    assert "difficulty.safetensors" in one_error(capsys)
    assert results_of(tmp_path / "run") == before
    by_stage = [*PACED, "--gin_param=DifficultyPacing.over_steps = None"]
    assert here(train, [*arguments(tmp_path / "stages"), *by_stage]) == 2
    assert "over_steps=None" in capsys.readouterr().err
    too_few = "--gin_param=DifficultyPacing.start = 0.01"
    assert here(train, [*arguments(tmp_path / "other"), *PACED, too_few]) == 2
    assert "start=0.01" in capsys.readouterr().err


def test_a_transform_that_cannot_be_fitted_is_one_line(
    tmp_path: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        "--gin_param=Experiment.transform = @zca_whitening",
        "--gin_param=zca_whitening.epsilon = -1",
    ]
    assert here(train, [*arguments(tmp_path / "run"), *wrong]) == 2
    assert "epsilon" in one_error(capsys)


def test_a_run_directory_that_is_a_file_is_one_line(
    tmp_path: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert here(train, arguments(tmp_path / "run")) == 2
    assert str(tmp_path / "run") in one_error(capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_parameter_without_effect_is_noted(
    tmp_path: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"Distiller__outer_steps": 1, "DSA__strategy": "flip"}
    assert here(train, arguments(tmp_path / "run", **changes)) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "DSA.strategy" in notes[0]


@pytest.mark.parametrize("module", [train, evaluate], ids=["train", "evaluate"])
def test_no_arguments_is_a_usage_error(
    module: Any, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(module, []) == 2
    assert capsys.readouterr().err.startswith(f"usage: python -m {module.__name__}")


@pytest.mark.parametrize("module", [train, evaluate], ids=["train", "evaluate"])
def test_help_shows_examples(
    module: Any, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(module, ["--help"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"examples:\n  python -m {re.escape(module.__name__)} \S", out)
    assert err == ""


def test_the_examples_of_help_name_files_that_are_there(
    here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    here(train, ["--help"])
    named = set(re.findall(r"--gin_file=(\S+)", capsys.readouterr().out)) - {"FILE"}
    assert "gin/digits.gin" in named
    for name in named:
        assert (DIGITS.parents[1] / name).is_file()


# Evaluating.


def test_evaluating_a_run_again_gives_the_same_results(copy: Path) -> None:
    before = contents(copy)
    done = command(copy.parent, "dd.evaluate", "run")
    assert done.returncode == 0, done.stderr
    found, expected = results_of(copy), json.loads(before["results.json"])
    for results in (found, expected):
        results["wall_clock_seconds"].pop("evaluating")
    assert found.pop("command").endswith("-m dd.evaluate run")
    assert "-m dd.train" in expected.pop("command")
    assert found == expected
    for name in ("random real", "distilled", "full data"):
        assert re.search(rf"^{name} .*±.*%", done.stdout, re.MULTILINE)
    changed = {name for name, content in contents(copy).items() if content != before.get(name)}
    assert changed == {"results.json"}


def test_evaluating_a_snapshot_leaves_the_results_of_the_run(
    copy: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    words = [str(copy), f"--set={copy / SNAPSHOT}", "--gin_param=Evaluator.networks = 3"]
    assert here(evaluate, words) == 0
    after = contents(copy)
    assert after.keys() - before.keys() == {"results-0.0001_minutes.json"}
    assert {name: after[name] for name in before} == before
    results = json.loads(after["results-0.0001_minutes.json"])
    check_accuracies(results, {"random_real": 3, "distilled": 3, "full_data": 1})
    assert results["outer_steps"] == 1
    assert results["distilled_set"]["file"] == SNAPSHOT.name
    assert "distilled" in capsys.readouterr().out


def test_results_can_go_elsewhere(copy: Path, here: Callable[..., int]) -> None:
    before = contents(copy)
    assert here(evaluate, [str(copy), f"--json={copy.parent / 'mine.json'}"]) == 0
    assert json.loads((copy.parent / "mine.json").read_text())["status"] == "complete"
    assert contents(copy) == before


def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert here(evaluate, [str(folder)]) == 2
        assert f"{folder} is no run directory" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "another kind"])
def test_a_set_that_cannot_be_read_is_one_line(
    damage: str, copy: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "distilled.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.copy(copy / "checkpoint.safetensors", path)
    before = contents(copy)
    assert here(evaluate, [str(copy)]) == 2
    assert "distilled.safetensors" in one_error(capsys)
    assert contents(copy) == before


def test_a_set_of_another_dataset_is_one_line(
    copy: Path, here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "distilled.safetensors"
    found = DistilledSet.load(path)
    DistilledSet(
        found.images, found.labels, found.transform, tuple("abcdefghij"), found.provenance
    ).save(path)
    assert here(evaluate, [str(copy)]) == 2
    assert "digits has others" in one_error(capsys)


def test_evaluation_with_another_split_is_refused(
    copy: Path, here: Callable[[Any, list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed of the split would put images that were trained on among the test images."""
    before = (copy / "results.json").read_text()
    assert here(evaluate, [str(copy), "--gin_param=digits.seed = 1"]) == 2
    assert "digits.seed was 0, now 1" in capsys.readouterr().err
    assert (copy / "results.json").read_text() == before


@pytest.mark.slow
def test_a_compiled_run_ends_where_an_eager_one_does(tmp_path: Path) -> None:
    for compile in (False, True):
        words = arguments(
            tmp_path / str(compile), Distiller__compile=compile, Distiller__minutes=60
        )
        done = command(tmp_path, "dd.train", *words)
        assert done.returncode == 0
        assert ("of them compiling" in done.stderr) == compile
    found, expected = (
        DistilledSet.load(tmp_path / str(compile) / "distilled.safetensors").images
        for compile in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
