"""Truncation schedules in a distillation: metrics, resuming, TensorBoard, one-line switching."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import GIN, curve, shown_in
from tiny_runs import distil as distil_in
from tiny_runs import experiment as tiny_experiment
from torch.func import functional_call

import bilevel
from bilevel.truncation import Stage
from dd import config
from dd.data.prepared import PreparedData
from dd.distillation.loop import CHECKPOINT, Distillation, begin, progress
from dd.distillation.state import TrainingState
from dd.experiment import Experiment
from dd.objectives.difficulty import SCORES, DifficultyPacing
from dd.runtime.files import DamagedFileError, read_tensors

INNER_STEPS, OUTER_STEPS = 10, 9
TINY: dict[str, Any] = {
    "ConvNet__width": 4,
    "Distiller__outer_steps": OUTER_STEPS,
    "Distiller__inner_steps": INNER_STEPS,
    "Distiller__image_every": 3,
    "Distiller__snapshot_minutes": [],
    "RealImages__real_batch": 40,
    "RealImages__held_out_batch": 50,
    "RandomWindow__window": 4,
}
STAGE_AWARE = [
    "Distiller.truncation = @StageAware()",
    "StageAware.window = 4",
    "StageAware.width_range = 2",
    "StageAware.refresh = 2",
]
BY_METRIC = [
    *STAGE_AWARE,
    "StageAware.transition = @ByMetric()",
    # No gain is ever enough, so that the stages end after 4 and after 8 outer steps.
    "ByMetric.gain = (9.0, 9.0)",
    "ByMetric.patience = (1, 1)",
    "ByMetric.block = 2",
]
BY_FRACTION = [*STAGE_AWARE, "StageAware.transition = @ByFraction()"]
#: Real images whose share grows with the stages, read ahead of the steps.
PACED = [
    *BY_METRIC,
    "RealImages.pacing = @DifficultyPacing()",
    "DifficultyPacing.networks = 1",
    "DifficultyPacing.epochs = 1",
    "Experiment.images_on = 'host'",
]


def experiment(*bindings: str) -> Experiment:
    return tiny_experiment(*bindings, **TINY)


@cache
def prepared(images_on: str = "device") -> PreparedData:
    return experiment(f"Experiment.images_on = {images_on!r}").prepare()


def distil(folder: Path, bindings: list[str], until: int | None = None) -> TrainingState:
    """The state at the end of a run, or after so many outer steps."""
    made = experiment(*bindings)
    return distil_in(made, prepared(made.images_on), folder, until).state


def begun(folder: Path, bindings: list[str]) -> Distillation:
    """A run before its first outer step."""
    made = experiment(*bindings)
    return begin(made.distiller, made.task(prepared(made.images_on), folder))


# Metrics.


def test_by_metric_goes_through_the_stages_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distil(tmp_path, BY_METRIC)
    shown = shown_in(tmp_path)
    assert curve(shown, "schedule/stage") == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    said = [line for line in capfd.readouterr().err.splitlines() if "stage begins" in line]
    assert len(said) == 2
    assert "outer step 4: the early stage ends" in said[0]
    assert "held_out_accuracy has gained less than 9" in said[0]
    accuracy = curve(shown, "outer/held_out_accuracy")
    assert curve(shown, "schedule/metric")[0] == pytest.approx(sum(accuracy[:2]) / 2)
    assert curve(shown, "schedule/gain_wanted") == [9.0] * 7


def test_by_fraction_goes_through_the_stages(tmp_path: Path) -> None:
    distil(tmp_path, BY_FRACTION)
    assert curve(shown_in(tmp_path), "schedule/stage") == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_progress_is_by_steps_or_by_time() -> None:
    distiller = experiment("Distiller.minutes = 2").distiller
    state = TrainingState({}, None, None, distiller.truncation, step=3, seconds=30.0)  # type: ignore[arg-type]
    assert progress(distiller, state) == pytest.approx(3 / OUTER_STEPS)
    state.seconds = 60.0
    assert progress(distiller, state) == pytest.approx(0.5)
    state.seconds = 120.0
    assert progress(distiller, state) == pytest.approx(1)


def test_the_held_out_accuracy_is_that_of_the_network_at_the_window_s_end(tmp_path: Path) -> None:
    """On a fixed batch of the validation split: nothing of the test set, nothing trained on."""
    run: Any = begun(tmp_path, BY_METRIC)
    held_out = run.objective.held_out
    assert len(set(held_out.tolist())) == len(held_out) == 50
    assert torch.equal(held_out, begun(tmp_path, BY_METRIC).objective.held_out)  # type: ignore[attr-defined]
    batch = run.objective.inputs(0, Stage.EARLY)[1]
    result = run.hypergradient(run.state.outer, batch, run.key.generator("outer", 0))
    distil(tmp_path, BY_METRIC, 1)
    validation = prepared().validation_images[held_out]
    logits = functional_call(run.task.network, result.params, (validation,))
    right = logits.argmax(1) == prepared().validation_labels[held_out]
    found = curve(shown_in(tmp_path), "outer/held_out_accuracy")
    assert found == pytest.approx([float(right.float().mean())])


def test_a_schedule_that_does_not_ask_pays_for_no_held_out_accuracy(tmp_path: Path) -> None:
    distil(tmp_path, [], 2)
    assert "outer/held_out_accuracy" not in shown_in(tmp_path).Tags()["scalars"]


def test_a_metric_that_is_not_supplied_is_refused_by_name() -> None:
    with pytest.raises(config.ConfigError, match=r"'held_out_acuracy'.*'held_out_accuracy'"):
        experiment(*BY_METRIC, "ByMetric.metric = 'held_out_acuracy'")


# Real images by difficulty.


def test_every_stage_draws_from_its_own_share_of_the_real_images(tmp_path: Path) -> None:
    run = begun(tmp_path, PACED)
    data = run.task.data
    pool = DifficultyPacing().pool(read_tensors(tmp_path / SCORES)[0]["scores"], data.train_labels)
    real = data.train_images[torch.arange(len(data.train_labels))].flatten(1)
    outside = []
    for step in range(3 * len(Stage)):
        stage = Stage(step // 3)
        images = torch.cat([piece[0] for piece in run.objective.inputs(step, stage)[1].batches])
        allowed = set(pool(step, stage).tolist())
        same_image = (images.flatten(1)[:, None] == real).all(2)
        assert same_image.any(1).all()
        drawn = same_image.int().argmax(1).tolist()
        assert set(drawn) <= allowed
        outside.append(len(set(drawn) - set(pool(step, Stage.EARLY).tolist())))
    assert outside[:3] == [0, 0, 0]
    assert min(outside[3:]) > 0


def test_scores_of_something_else_are_refused(tmp_path: Path) -> None:
    distil(tmp_path, PACED, 1)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(DamagedFileError, match=r"difficulty\.safetensors .* delete it"):
        distil(tmp_path, [*PACED, "DifficultyPacing.epochs = 2"], 1)


def test_a_share_by_stage_needs_a_schedule_with_stages(tmp_path: Path) -> None:
    rat = [*PACED, "Distiller.truncation = @RandomWindow()"]
    with pytest.raises(bilevel.ConfigurationError, match="over_steps=None"):
        distil(tmp_path, rat)


# TensorBoard.


def test_tensorboard_shows_the_windows_and_where_they_come_from(tmp_path: Path) -> None:
    state = distil(tmp_path, BY_FRACTION)
    shown = shown_in(tmp_path)
    starts, stops, widths = (curve(shown, f"window/{n}") for n in ("start", "stop", "width"))
    assert widths == [stop - start for start, stop in zip(starts, stops, strict=True)]
    assert set(widths) <= set(range(2, 7))
    assert all(1 <= n <= INNER_STEPS for n in curve(shown, "schedule/effective_windows"))
    chances = shown.Histograms("schedule/start_probability")
    # Every third step is due. The chances are shown at once, also in the middle stage; the norms
    # with the next run that is recorded to its end.
    assert [event.step for event in chances] == [1, 3, 6, 9]
    norms = shown.Histograms("schedule/gradient_norm")
    assert [event.step for event in norms] == [1, 3, 7, 9]
    last = chances[-1].histogram_value
    expected = state.truncation.report()["start_probability"]
    assert isinstance(expected, torch.Tensor)
    heights = {
        round(limit): height for limit, height in zip(last.bucket_limit, last.bucket, strict=True)
    }
    # The bucket of inner step t is (t, t + 1]; empty ones at the ends are not stored.
    assert all(heights.get(t + 1, 0.0) == pytest.approx(float(p)) for t, p in enumerate(expected))
    for event in norms:
        assert len(event.histogram_value.bucket) == INNER_STEPS
        assert all(height > 0 for height in event.histogram_value.bucket)


def test_profiles_are_of_whole_runs_whatever_the_refresh(tmp_path: Path) -> None:
    distil(tmp_path, [*BY_FRACTION, "StageAware.refresh = 3"])
    found = shown_in(tmp_path).Histograms("schedule/gradient_norm")
    # The recordings that the schedule reads: the first outer step, and the first of the late stage.
    assert [event.step for event in found] == [1, 7]
    assert {len(event.histogram_value.bucket) for event in found} == {INNER_STEPS}


@pytest.mark.parametrize("bindings", [BY_FRACTION, []], ids=["at", "rat"])
def test_the_loss_at_stop_is_that_of_the_last_differentiated_step(
    bindings: list[str], tmp_path: Path
) -> None:
    bindings = [*bindings, "Experiment.seed = 1"]  # whose first window ends before the run does
    run = begun(tmp_path, bindings)
    batch = run.objective.inputs(0, run.state.truncation.stage)[1]
    result = run.hypergradient(run.state.outer, batch, run.key.generator("outer", 0))
    assert result.window.stop < INNER_STEPS
    distil(tmp_path, bindings, 1)
    expected = float(result.trace["inner_loss"][result.window.stop - 1])
    assert curve(shown_in(tmp_path), "inner/loss_at_stop") == [pytest.approx(expected)]


# Configuration.


def test_the_released_schedule_of_the_documentation_builds() -> None:
    page = (GIN.parent / "docs" / "papers.md").read_text()
    (block,) = re.findall(r"on top of `gin/cifar10_at.gin`:\n\n```\n(.*?)```", page, re.DOTALL)
    small = ["Experiment.dataset = @digits()", "ConvNet.depth = 1", "ConvNet.width = 4"]
    made = config.load([str(GIN / "cifar10_at.gin")], [*small, *block.splitlines()])
    schedule = made.distiller.truncation
    assert isinstance(schedule, bilevel.truncation.StageAware)
    assert (schedule.position, schedule.width, schedule.metrics) == (
        "mirrored",
        "stage",
        ("accuracy",),
    )


SWITCHES = {
    "Distiller.truncation = @Full()": bilevel.truncation.Full,
    "Distiller.truncation = @Last()": bilevel.truncation.Last,
    "Distiller.truncation = @LogUniform()": bilevel.truncation.LogUniform,
    "Distiller.truncation = @Pessimistic()": bilevel.truncation.Pessimistic,
    "Distiller.truncation = @RandomWindow()": bilevel.truncation.RandomWindow,
    "Distiller.truncation = @StageAware()": bilevel.truncation.StageAware,
    "Distiller.truncation = @WithinTrajectoryPolicy()": bilevel.truncation.WithinTrajectoryPolicy,
}
#: All but those of trajectory matching, which goes from the first step to the nearest or last, and
#: of feature matching, which has no steps.
META_LOSS_FILES = sorted(
    path.name
    for path in GIN.glob("*.gin")
    if path.name != "schedules.gin" and not re.search("att|mtt|dm|experts", path.name)
)
ONE_LINE = {
    **SWITCHES,
    "StageAware.transition = @ByFraction()": bilevel.truncation.StageAware,
    "StageAware.transition = @ByMetric()": bilevel.truncation.StageAware,
    "StageAware.distribution = @Softmax()": bilevel.truncation.StageAware,
    "StageAware.position = 'mirrored'": bilevel.truncation.StageAware,
    "StageAware.width = 'stage'": bilevel.truncation.StageAware,
}


@pytest.mark.parametrize("binding", ONE_LINE)
@pytest.mark.parametrize("name", ["cifar10_at.gin", "cifar10_at_cpu.gin"])
def test_one_line_switches_the_schedule(name: str, binding: str) -> None:
    small = ["Experiment.dataset = @digits()", "ConvNet.depth = 2", "ConvNet.width = 8"]
    made = config.load([str(GIN / name)], [*small, binding])
    assert isinstance(made.distiller.truncation, ONE_LINE[binding])


@pytest.mark.parametrize("binding", SWITCHES)
@pytest.mark.parametrize("name", META_LOSS_FILES)
def test_one_line_switches_any_file_s_schedule(name: str, binding: str) -> None:
    small = ["Experiment.dataset = @digits()", "ConvNet.depth = 2", "ConvNet.width = 8"]
    whole = ["RealImages.alignment = None", "SyntheticDataset.patches_per_side = 1"]
    made = config.load([str(GIN / name)], [*small, *whole, binding])
    assert isinstance(made.distiller.truncation, SWITCHES[binding])


def test_what_an_included_file_sets_is_not_called_without_effect(tmp_path: Path) -> None:
    main = tmp_path / "main.gin"
    main.write_text(f"include '{GIN / 'digits.gin'}'\nDistiller.truncation = @Full()\n")
    config.load([str(main)], [])
    assert config.unused() == []
    config.load([str(main)], ["RandomWindow.window=5"])
    assert config.unused() == ["RandomWindow.window"]


def test_the_published_settings() -> None:
    small = ["Experiment.dataset = @digits()", "ConvNet.depth = 2", "ConvNet.width = 8"]
    for name in ("cifar10.gin", "cifar10_at.gin"):
        made = config.load([str(GIN / name)], small).distiller
        assert (made.truncation.window, made.truncation.width_range) == (40, 10)
        assert made.inner_steps == 200
        assert made.truncation.stage == Stage.EARLY
    made = config.load([str(GIN / "cifar10_atpp.gin")], small).distiller
    assert (made.truncation.window, made.truncation.width_range, made.inner_steps) == (16, 8, 32)


@pytest.mark.parametrize("name", ["LogUniform", "Pessimistic"])
def test_runs_of_any_length_distil(name: str, tmp_path: Path) -> None:
    bindings = [f"Distiller.truncation = @{name}()", f"{name}.minimum = 3"]
    state = distil(tmp_path, [*bindings, "LogUniform.window = None"], 2)
    assert state.step == 2
    shown = shown_in(tmp_path)
    assert curve(shown, "window/start") == [0, 0]
    assert all(3 <= stop <= INNER_STEPS for stop in curve(shown, "window/stop"))
