"""Going on: a resumed run equals an uninterrupted one, whatever has a state; others are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    OUTER_STEPS,
    arguments,
    contents,
    distil,
    experiment,
    one_error,
    results_of,
    shown_in,
    steps_of,
)

from dd import experts, train
from dd.data.prepared import PreparedData
from dd.distillation import loop
from dd.distillation.events import Event, Stepped
from dd.distillation.loop import Distillation
from dd.distillation.recorder import AVERAGE, DISTILLED
from dd.distillation.resuming import CHECKPOINT, DAMAGED, PREVIOUS
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment
from dd.runtime.files import DamagedFileError, read_sealed, read_tensors, write_sealed
from dd.runtime.stopping import StopRequest

OLD_RUN = Path(__file__).with_name("run_of_0.1")
STAGE_AWARE = {
    "Distiller__truncation": "@StageAware()",
    "StageAware__window": 3,
    "StageAware__width_range": 1,
    "StageAware__refresh": 2,
}
BY_METRIC = {
    **STAGE_AWARE,
    "StageAware__transition": "@ByMetric()",
    # No gain is ever enough, so that the stages end after 2 and after 4 outer steps.
    "ByMetric__gain": (9.0, 9.0),
    "ByMetric__patience": (1, 1),
    "ByMetric__block": 1,
}
BY_FRACTION = {**STAGE_AWARE, "StageAware__transition": "@ByFraction()"}
POLICY = {
    "Distiller__truncation": "@WithinTrajectoryPolicy()",
    "WithinTrajectoryPolicy__window": 3,
    "WithinTrajectoryPolicy__width_range": 2,
}
#: What has a state of its own, or draws what a resumed run has to draw again.
STATES: dict[str, dict[str, Any]] = {
    "window drawn for two steps": {"RandomWindow__refresh": 2},
    "stages by a metric": BY_METRIC,
    "stages by the part done": BY_FRACTION,
    "learned policy": POLICY,
    "real images paced by stage and read ahead": {
        **BY_METRIC,
        "RealImages__pacing": "@DifficultyPacing()",
        "DifficultyPacing__networks": 1,
        "DifficultyPacing__epochs": 1,
        "Experiment__images_on": "host",
    },
    "labels, average, clip of patches, best set": {
        "SyntheticDataset__learn_labels": True,
        "SyntheticDataset__patches_per_side": 2,
        "SyntheticDataset__projection": "every_step",
        "Distiller__clip": "@MovingAverageRowClip()",
        "Distiller__average_decay": 0.7,
        "Distiller__validate_every": 2,
    },
    "bases, coefficients, their average and best set": {
        "SyntheticDataset__parameterisation": "@Bases()",
        "SyntheticDataset__batch_per_class": 2,
        "Bases__number": 8,
        "Distiller__clip": "@MovingAverageRowClip()",
        "Distiller__average_decay": 0.7,
        "Distiller__validate_every": 2,
    },
    "momentum, learned rate, stretches of experts": {
        "file": "cifar10_att_cpu.gin",
        "Experiment__dataset": "@digits()",
        "Experts__count": 2,
        "Experts__snapshots": 4,
        "Experts__steps_between_snapshots": 1,
        "MatchExperts__max_start": 3,
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Experiment, Any]]:
    """An experiment in which something has a state, and its data."""
    folder = tmp_path_factory.mktemp("experts")
    data: dict[str, PreparedData] = {}

    def make(name: str) -> tuple[Experiment, PreparedData]:
        changes = {**STATES[name]}
        if "file" in changes:
            changes["Experts__folder"] = str(folder)
            assert experts.main(arguments(None, **changes)) == 0
        found = experiment(**changes)
        if name not in data:
            data[name] = found.prepare()
        return found, data[name]

    return make


@pytest.mark.parametrize("name", STATES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str,
    made: Callable[[str], tuple[Experiment, PreparedData]],
    tmp_path: Path,
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    distil(*made(name), whole)
    # Between two draws of a window that is used twice, and between the stages of a schedule.
    for until in (1, 3, None):
        distil(*made(name), resumed, until)
    for file in (CHECKPOINT, DISTILLED, AVERAGE):
        if (whole / file).exists():
            assert_same(read_tensors(resumed / file), read_tensors(whole / file))


@pytest.mark.parametrize("asked", ["before", "while it goes on"])
def test_a_validation_that_is_left_comes_first_when_the_run_goes_on(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"Distiller__outer_steps": 4, "Distiller__validate_every": 2}
    made = experiment(**changes)
    data, stop = made.prepare(), StopRequest()
    distil(made, data, tmp_path / "whole")

    def ask(event: Event) -> None:
        stop.by_caller |= asked == "before" and isinstance(event, Stepped) and event.step == 2

    def interrupt(*_: Any) -> None:
        assert stop.at_once  # so that a signal is heard at once
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if asked != "before":
            patch.setattr(Evaluator, "validation", interrupt)
        report = made.train(data, tmp_path / "left", stop, "", watch=ask)
    assert (report.status, report.outer_steps) == ("interrupted", 2)
    assert read_tensors(tmp_path / "left" / CHECKPOINT)[1]["validation_due"]
    distil(made, data, tmp_path / "left")
    for file in (CHECKPOINT, DISTILLED):
        assert_same(*(read_tensors(tmp_path / name / file) for name in ("left", "whole")))


def assert_same(one: tuple[dict[str, Any], Any], other: tuple[dict[str, Any], Any]) -> None:
    """The contents of two files of a run; the time that was spent may differ."""
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    for metadata in (one[1], other[1]):
        (metadata.get("provenance") or metadata).pop("seconds")
    assert one[1] == other[1]


# By the command.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(arguments(folder)) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_command_goes_on_and_judges_what_a_whole_run_judges(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main(arguments(folder, Distiller__outer_steps=3)) == 0
    assert train.main(arguments(folder)) == 0
    assert f"resuming the run in {folder}" in capsys.readouterr().out
    expected, found = results_of(finished), results_of(folder)
    assert found["outer_steps"] == OUTER_STEPS
    assert found["accuracy"] == expected["accuracy"]
    for name in ("window/start", "outer/loss"):
        assert steps_of(shown_in(folder), name) == list(range(1, OUTER_STEPS + 1))


def test_a_run_of_before_a_parameter_was_there_goes_on(copy: Path) -> None:
    path = copy / "config.gin"
    lines = read_sealed(path).splitlines()
    write_sealed(path, "\n".join(line for line in lines if "parameterisation" not in line))
    assert train.main(arguments(copy)) == 0


def test_a_run_that_dies_in_its_first_steps_can_be_resumed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = loop.outer_step, iter(range(OUTER_STEPS))

    def dying_step(run: Distillation) -> Any:
        if next(steps) == 2:
            raise MemoryError
        return step(run)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "outer_step", dying_step)
        assert train.main(arguments(tmp_path / "run")) == 1
    assert train.main(arguments(tmp_path / "run")) == 0
    assert_same(read_tensors(tmp_path / "run" / CHECKPOINT), read_tensors(finished / CHECKPOINT))
    assert steps_of(shown_in(tmp_path / "run"), "outer/loss") == list(range(1, OUTER_STEPS + 1))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"RandomWindow__window": 2}, "RandomWindow.window was 3, now 2"),
        ({"Experiment__seed": 1}, "Experiment.seed was 0, now 1"),
        ({"ConvNet__width": 9}, "ConvNet.width was 8, now 9"),
    ],
)
def test_another_configuration_is_refused(
    changes: dict[str, int], name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    assert train.main(arguments(copy, Distiller__outer_steps=9, **changes)) == 2
    message = one_error(capsys)
    assert name in message
    assert str(copy) in message
    assert contents(copy) == before


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    data = experiment().prepare()
    distil(experiment(**BY_METRIC), data, tmp_path, 2)
    before = (tmp_path / CHECKPOINT).read_bytes()
    for other in (BY_FRACTION, POLICY):
        with pytest.raises(DamagedFileError, match="checkpoint"):
            distil(experiment(**other), data, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing"])
def test_in_place_of_a_damaged_checkpoint_the_one_before_it_is_used(
    damage: str, finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / CHECKPOINT
    good = path.read_bytes()
    bad = {"truncated": good[:-10], "empty": b"", "foreign": b"PK\3\4 a zip"}.get(damage)
    path.unlink()
    if bad is not None:
        path.write_bytes(bad)
    assert train.main(arguments(copy)) == 0
    printed = capsys.readouterr().err
    assert CHECKPOINT in printed
    assert f"the run goes on from {copy / PREVIOUS}, after outer step 0" in printed
    assert_same(read_tensors(path), read_tensors(finished / CHECKPOINT))
    assert (copy / DAMAGED).exists() == (bad is not None)
    assert bad is None or (copy / DAMAGED).read_bytes() == bad


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_where_both_checkpoints_are_damaged_nothing_is_overwritten(
    damage: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (copy / CHECKPOINT, copy / PREVIOUS):
        good = path.read_bytes()
        content = {"truncated": good[:-10], "empty": b"", "foreign": b"PK\3\4 a zip"}[damage]
        path.write_bytes(content)
    before = contents(copy)
    assert train.main(arguments(copy, Distiller__outer_steps=9)) == 2
    assert str(path) in one_error(capsys)
    assert contents(copy) == before


def test_a_checkpoint_without_its_configuration_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "config.gin").unlink()
    before = contents(copy)
    assert train.main(arguments(copy)) == 2
    assert "config.gin" in one_error(capsys)
    assert contents(copy) == before


def test_a_run_goes_on_with_its_own_data_and_says_what_else_is_new(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert train.main(arguments(copy, Distiller__outer_steps=7)) == 0
    assert "note: this run had threads 1, now 7; its last digits may" in capsys.readouterr().err
    before = contents(copy)
    monkeypatch.setattr("dd.experiment.fingerprint", lambda _: "0123")
    assert train.main(arguments(copy, Distiller__outer_steps=8)) == 2
    message = one_error(capsys)
    assert f"{copy} holds a run that was begun with other training data" in message
    assert "now 0123" in message
    assert contents(copy) == before


def test_a_run_of_version_0_1_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(OLD_RUN, tmp_path / "run"))
    before = contents(folder)
    assert train.main(arguments(folder)) == 2
    assert f"{folder} holds a run of version 0.1, which cannot be resumed" in one_error(capsys)
    assert contents(folder) == before
    with pytest.raises(DamagedFileError, match=r"made by version 0\.1, whose runs cannot be res"):
        distil(experiment(), experiment().prepare(), folder)
