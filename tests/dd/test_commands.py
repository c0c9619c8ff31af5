"""`dd.train` as a user runs it: what it prints, writes, survives and refuses."""

import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    GIN,
    INNER_STEPS,
    OUTER_STEPS,
    SNAPSHOT,
    WINDOW,
    arguments,
    command,
    curve,
    one_error,
    process,
    results_of,
    run_command,
    shown_in,
    steps_of,
)

from dd import config, evaluate, experts, export, sweep, train
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.runtime.files import read_sealed, read_tensors


def outer(folder: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_tensors(folder / "checkpoint.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("outer.")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, and what was printed; tests copy it before they change it."""
    cwd = tmp_path_factory.mktemp("finished")
    done = command(cwd, "dd.train", *arguments("run"))
    assert done.returncode == 0, done.stderr
    return cwd / "run", done.stdout


# A run.


def test_a_run_leaves_what_it_promises(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "checkpoint.safetensors",
        "checkpoint.previous.safetensors",
        "confusion.png",
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
    shown = shown_in(finished[0])
    every = list(range(1, OUTER_STEPS + 1))
    for name in ("window/start", "window/stop", "hypergradient/norm", "outer/loss"):
        assert steps_of(shown, name) == every
    starts = curve(shown, "window/start")
    stops = curve(shown, "window/stop")
    assert all(
        start >= 0 and stop <= INNER_STEPS for start, stop in zip(starts, stops, strict=True)
    )
    assert {stop - start for start, stop in zip(starts, stops, strict=True)} == {WINDOW}
    assert len(set(starts)) > 1
    assert all(norm > 0 for norm in curve(shown, "hypergradient/norm"))
    assert all(0 <= value <= 1 for value in curve(shown, "outer/accuracy"))


def test_tensorboard_says_what_the_time_of_a_step_went_to(finished: tuple[Path, str]) -> None:
    shown = shown_in(finished[0])
    parts = [curve(shown, f"time/{name}") for name in ("rollout", "selection", "backward")]
    for of_parts, whole in zip(
        zip(*parts, strict=True), curve(shown, "time/hypergradient"), strict=True
    ):
        assert all(seconds >= 0 for seconds in of_parts)
        assert 0 < sum(of_parts) <= whole * (1 + 1e-6)
    for name in ("rollout", "selection", "backward", "outer_update"):
        (said,) = {shown.SummaryMetadata(f"time/{name}").summary_description}
        assert said


def test_the_clipping_bound_follows_the_average_norm_of_all_steps(
    finished: tuple[Path, str],
) -> None:
    shown = shown_in(finished[0])
    norms = curve(shown, "hypergradient/norm")
    bounds = curve(shown, "hypergradient/clip_bound")
    average = norms[0]
    for norm, bound in zip(norms, bounds, strict=True):
        average = 0.9 * average + 0.1 * norm
        assert bound == pytest.approx(2 * average, rel=1e-5)


def test_tensorboard_shows_the_configuration(finished: tuple[Path, str]) -> None:
    (event,) = shown_in(finished[0]).Tensors("config/text_summary")
    shown = event.tensor_proto.string_val[0].decode()
    for line in read_sealed(finished[0] / "config.gin").splitlines():
        assert line in shown
    assert "RandomWindow.window = 3" in shown


def test_tensorboard_shows_the_images(finished: tuple[Path, str]) -> None:
    shown = shown_in(finished[0])
    for name in ("synthetic_images/clamped", "synthetic_images/stretched"):
        pictures = shown.Images(name)
        assert {picture.step for picture in pictures} == {0, 2, 4, 6}
        for picture in pictures:
            assert picture.encoded_image_string.startswith(b"\x89PNG")
            # Two rows of five digits of 8×8 pixels, enlarged to 64×64, with borders of 2, and
            # over each its name.
            assert (picture.width, picture.height) == (5 * 66 + 2, 2 * (66 + 16) + 2)


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
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert train.main(arguments(tmp_path / name, Experiment__seed=seed)) == 0
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


# Stopping.


def stopped_by(
    number: signal.Signals, cwd: Path, ready: Callable[[Path], bool], **changes: Any
) -> tuple[int, str, str]:
    """Start a long run, send a signal once its folder is `ready`; exit status, stdout, stderr."""
    running = process(cwd, "dd.train", *arguments("run", **changes))
    try:
        deadline = time.monotonic() + 60
        while not ready(cwd / "run"):
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(number)
        out, err = running.communicate(timeout=15)
    finally:
        running.kill()
    return running.returncode, out, err


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_a_run_that_can_go_on(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, _, err = stopped_by(
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

    assert train.main(arguments(folder, Distiller__outer_steps=steps + 2)) == 0
    results = results_of(folder)
    assert results["status"] == "complete"
    assert results["outer_steps"] == steps + 2


@pytest.mark.slow
def test_a_signal_stops_an_evaluation(tmp_path: Path) -> None:
    def evaluating(run: Path) -> bool:
        return (run / "results.json").exists() and (
            results_of(run)["accuracy"]["distilled"] is not None
        )

    status, out, err = stopped_by(
        signal.SIGINT, tmp_path, evaluating, Evaluator__full_data_steps=[10**6]
    )
    assert status == 130, err
    assert "Traceback" not in err
    results = results_of(tmp_path / "run")
    assert results["status"] == "interrupted"
    assert 0 <= results["accuracy"]["distilled"]["mean"] <= 1
    assert out.endswith(
        "the distilled set is kept: run/distilled.safetensors\n"
        "to evaluate it later: dd-evaluate run\n"
    )
    assert (tmp_path / "run" / "distilled.safetensors").exists()


def test_a_finished_run_that_is_started_again_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = arguments(tmp_path / "run", Distiller__outer_steps=1)
    assert train.main(words) == 0
    before = results_of(tmp_path / "run")
    monkeypatch.setattr(Evaluator, "random_real", interrupt)
    assert train.main(words) == 130
    after = results_of(tmp_path / "run")
    assert after["status"] == "interrupted"
    assert after["accuracy"] == before["accuracy"]


# Mistakes.


def test_a_misspelt_parameter_is_one_line(tmp_path: Path) -> None:
    done = command(tmp_path, "dd.train", *arguments("run", RandomWindow__windw=3))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: RandomWindow has no parameter 'windw'; did you mean 'window'?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(GIN / "digit.gin")
    assert train.main([f"--gin_file={missing}", f"--run_dir={tmp_path / 'run'}"]) == 2
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(arguments(tmp_path / "run", **changes)) == 2
    assert list(changes)[-1].split("__")[1] in one_error(capsys)


PACED = {
    "RealImages__pacing": "@DifficultyPacing()",
    "DifficultyPacing__over_steps": 4,
    "DifficultyPacing__networks": 1,
    "DifficultyPacing__epochs": 1,
}


def test_real_images_can_be_paced_by_difficulty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main(arguments(folder, **PACED)) == 0
    assert "scoring real images" in capsys.readouterr().err
    assert results_of(folder)["status"] == "complete"
    assert train.main(arguments(folder, **PACED, Distiller__outer_steps=OUTER_STEPS + 1)) == 0
    # The scores are kept, so that a resumed run draws from the same images.
    assert "scoring real images" not in capsys.readouterr().err
    (folder / "difficulty.safetensors").write_bytes(b"{")
    before = results_of(folder)
    assert train.main(arguments(folder, **PACED, Distiller__outer_steps=99)) == 2
    assert "difficulty.safetensors" in one_error(capsys)
    assert results_of(folder) == before
    by_stage = {**PACED, "DifficultyPacing__over_steps": None}
    assert train.main(arguments(tmp_path / "stages", **by_stage)) == 2
    assert "over_steps=None" in one_error(capsys)
    assert train.main(arguments(tmp_path / "other", **PACED, DifficultyPacing__start=0.01)) == 2
    assert "start=0.01" in one_error(capsys)


def test_a_transform_that_cannot_be_fitted_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"Experiment__transform": "@zca_whitening", "zca_whitening__epsilon": -1}
    assert train.main(arguments(tmp_path / "run", **wrong)) == 2
    assert "epsilon" in one_error(capsys)


def test_a_run_directory_that_is_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert train.main(arguments(tmp_path / "run")) == 2
    assert str(tmp_path / "run") in one_error(capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_parameter_without_effect_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where another setting is why, and where nothing ever referred to it."""
    changes = {"Distiller__outer_steps": 1, "Distiller__truncation": "@Full()"}
    assert train.main(arguments(tmp_path / "run", DSA__strategy="flip", **changes)) == 0
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "has no effect" in line]
    assert sorted(line.partition(" is set, ")[0] for line in lines) == [
        "warning: DSA.strategy (--gin_param)",
        "warning: RandomWindow.window (--gin_param)",
    ]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (evaluate, ["digits-ipc1", "--set="]),
        (evaluate, ["digits-ipc1", "--architectures", ""]),
        (evaluate, ["digits-ipc1", "--json="]),
        (evaluate, [""]),
        (train, ["--gin_file=digits", "--run_dir="]),
        (train, ["--gin_file=digits", "--run_dir", ""]),
        (experts, ["--gin_file="]),
        (export, ["digits-ipc1", "--out="]),
        (sweep, ["--gin_file=digits", "--sweep_dir="]),
    ],
)
def test_an_empty_argument_is_a_usage_error(
    module: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    assert ended.value.code == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize("module", [train, evaluate, experts], ids=lambda module: module.__name__)
def test_no_arguments_is_a_usage_error(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(module, []) == 2
    assert capsys.readouterr().err.startswith(f"usage: python -m {module.__name__}")


@pytest.mark.parametrize("module", [train, evaluate, experts], ids=lambda module: module.__name__)
def test_help_shows_examples(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(module, ["--help"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"examples:\n  python -m {re.escape(module.__name__)} \S", out)
    assert err == ""


def test_the_examples_of_help_name_files_that_are_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_command(train, ["--help"])
    named = set(re.findall(r"--gin_file=(\S+)", capsys.readouterr().out)) - {"FILE"}
    assert "gin/digits.gin" in named
    for name in named:
        assert (GIN.parent / name).is_file()


@pytest.mark.slow
def test_a_compiled_run_ends_where_an_eager_one_does(tmp_path: Path) -> None:
    for compile in (False, True):
        words = arguments(tmp_path / str(compile), Distiller__compile=compile)
        done = command(tmp_path, "dd.train", *words)
        assert done.returncode == 0
        assert ("of them compiling" in done.stderr) == compile
    found, expected = (
        DistilledSet.load(tmp_path / str(compile) / "distilled.safetensors").images
        for compile in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
