"""TensorBoard: what is written can be read back."""

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import bilevel
from dd.distillation.charts import NO_STAGE, STAGES, HeatMap, WindowBand
from dd.distillation.gallery import image_grid, stretched
from dd.distillation.monitor import Monitor, show_result
from dd.distillation.progress import Progress
from dd.runtime.plain import duration


class Quadratic(bilevel.Problem):
    """ℓ = ½ Σ i·(θ_i − φ_i)² with i = 1 … p."""

    def init(self, outer: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(outer)

    def inner_batch(self, outer: Tensor, step: int, *, generator: torch.Generator) -> Tensor:
        return outer

    def inner_loss(self, params: Tensor, batch: Tensor) -> Tensor:
        curvatures = torch.arange(1, len(params) + 1, device=params.device)
        return 0.5 * (curvatures * (params - batch) ** 2).sum()

    def outer_loss(self, params: Tensor, outer: Tensor, batch: Tensor) -> Tensor:
        return ((params - 1) ** 2).sum()


def test_a_low_rank_hessian_shows_its_spectrum(tmp_path: Path) -> None:
    basis = bilevel.basis.Eigenvectors(6)
    hypergradient = bilevel.Hypergradient(
        Quadratic(), bilevel.optim.sgd(0.01), 8, estimator=bilevel.estimators.LowRank(basis)
    )
    monitor = Monitor(tmp_path)
    monitor.outer_step(3, hypergradient(torch.randn(6)), None, 0.1)
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    names = {name for name in events.Tags()["scalars"] if name.startswith("low_rank/")}
    eigenvalues = [f"low_rank/eigenvalue_{index}" for index in range(4)]
    assert names == {
        *("low_rank/rank", "low_rank/evaluations", "low_rank/staleness", "low_rank/exact"),
        *eigenvalues,
    }
    found = [events.Scalars(name)[0].value for name in eigenvalues]
    assert found == pytest.approx([6, 5, 4, 3], rel=1e-3)
    assert events.Scalars("low_rank/rank")[0].value == 6
    assert events.Scalars("low_rank/rank")[0].step == 3


def test_the_window_is_drawn_where_it_was_in_the_colour_of_its_stage() -> None:
    band = WindowBand("window", inner_steps=10)
    for step, stage in ((1, "early"), (2, None), (4, "late")):
        band.append(step, step, step + 5, stage)
    shown = band.picture()
    colours = {tuple(colour) for colour in shown.flatten(1).T.tolist()}
    assert {STAGES["early"], STAGES["late"], NO_STAGE} <= colours
    assert STAGES["middle"] not in colours
    # The third of four columns has no outer step.
    plot = shown[:, 25:263, 57:695]
    assert bool((plot[:, :, 330:470] == 255).all())
    assert plot[:, 238 - 3 * 24, 20].tolist() == list(STAGES["early"])
    assert plot[:, 238 - 12, 20].tolist() == [255] * 3


@pytest.mark.parametrize("steps", [1, 700, 3000])
def test_a_heat_map_of_any_number_of_steps_has_one_size(steps: int) -> None:
    drawn = HeatMap("norms", inner_steps=6)
    for step in range(1, steps + 1):
        drawn.append(step, torch.tensor([1.0, 10.0, torch.nan, 0.0]), start=1)
    shown = drawn.picture()
    assert shown.shape == (3, 300, 708)
    # From below: nothing, the least value, the greatest, and nothing for three.
    rows = [shown[:, 264 - 20 - 40 * index, 300].tolist() for index in range(6)]
    assert rows[0] == rows[3] == rows[4] == rows[5] == [255] * 3
    assert rows[1] == [68, 1, 84]
    assert rows[2] == [253, 231, 37]


@pytest.mark.parametrize(("classes", "per_class"), [(1, 1), (10, 1), (3, 12), (25, 4), (120, 1)])
def test_all_classes_are_shown_under_their_names(classes: int, per_class: int) -> None:
    pixels = torch.zeros(classes * per_class, 3, 8, 8)
    pixels[::per_class] = torch.linspace(0.1, 0.9, classes)[:, None, None, None]
    grid = image_grid(pixels, per_class, ["a name"] * classes)
    greys = set((255 * torch.linspace(0.1, 0.9, classes)).int().tolist())
    assert greys <= set(grid[:, 16:].flatten().tolist())
    assert grid.shape[0] == 3
    assert image_grid(pixels, per_class).shape[1] < grid.shape[1]


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_a_stretched_channel_does_not_depend_on_its_scale_or_mean(
    scale: float, shift: float
) -> None:
    pixels = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=seeded(0))
    shown = stretched(scale * pixels + shift)
    torch.testing.assert_close(shown, stretched(pixels))
    assert shown.amin((2, 3)).flatten().tolist() == pytest.approx([0.0] * 6, abs=1e-9)
    assert shown.amax((2, 3)).flatten().tolist() == pytest.approx([1.0] * 6, abs=1e-9)
    assert bool((stretched(torch.full((1, 1, 4, 4), shift)) - 0.5).abs().max() < 0.01)


def test_what_is_drawn_on_an_even_ground_is_shown_black_and_white() -> None:
    pixels = torch.full((1, 1, 20, 20), 0.3)
    pixels[..., 5:15, 9:11] = 0.7
    pixels[..., 0, 0] = 50.0  # one pixel does not make all others one grey
    assert stretched(pixels).unique().tolist() == [0.0, 1.0]


def test_curves_come_with_a_description_a_layout_and_what_was_found(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.scalars(1, {"window/start": 3.0, "own": 1.0})
    monitor.scalars(2, {"window/start": 4.0})
    text = "# of the run\nConvNet.width = 8\nExperiment.network = @ConvNet\nname = 'a'\n"
    monitor.close()
    show_result(tmp_path, 2, text, {"distilled": 0.5})
    events = EventAccumulator(str(tmp_path)).Reload()
    described = events.SummaryMetadata("window/start").summary_description
    assert described == "The first inner step that is differentiated."
    assert [event.value for event in events.Scalars("window/start")] == [3.0, 4.0]
    assert events.Scalars("accuracy/distilled")[0].value == 0.5
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    started = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"ConvNet.width" in started
    assert b"Experiment.network" not in started


class Clock:
    """Time that passes only when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("steps", "minutes", "between", "expected"),
    [(100, None, 0.0, 94 * 2), (100, 1, 0.0, 48), (100, None, 1.0, 94 * 3)],
)
def test_what_is_left_does_not_count_the_first_step(
    steps: int,
    minutes: float | None,
    between: float,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("dd.distillation.progress.time", clock)
    progress = Progress(steps, minutes)
    seconds = 0.0
    first = 50.0 if minutes is None else 2.0
    for step in range(1, 7):
        spent = first if step == 1 else 2.0
        seconds += spent
        clock.now += spent + between
        progress.update(step, seconds, 0.5, {"accuracy": 0.5}, "early")
    progress.close()
    assert progress.steps_timed == 5
    assert progress.remaining() == pytest.approx(expected)


def test_the_bar_says_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(12, None, validate_every=5, then="evaluation")
    shown = []
    for step in range(1, 13):
        progress.update(step, 60.0 * step, 0.5, {})
        progress.validating(50.0, may_be_put_off=step == 5)
        shown.append(capsys.readouterr().err)
        progress.validated()
    progress.close()
    assert "validating, about 50 s, Ctrl-C puts it off " in shown[4]
    assert "validating, about 50 s " in shown[5]
    assert "7 min left, validation in 5 min, step 5" in shown[4]
    assert "60 s left, then evaluation, step 11" in shown[10]
    assert "distilling 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (720, "12 min"), (12_600, "3.5 h"), (950_000, "11 days")],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_a_run_found_is_read_after_all_else_of_the_same_second(tmp_path: Path) -> None:
    other = tmp_path / f"events.out.tfevents.{int(time.time())}.zzz"
    other.touch()
    show_result(tmp_path, 2, "", {"distilled": 0.5})
    (made,) = set(tmp_path.iterdir()) - {other}
    assert made > other
    assert EventAccumulator(str(made)).Reload().Scalars("accuracy/distilled")[0].value == 0.5


def test_what_is_resumed_in_the_same_second_is_read_after_what_was_before(tmp_path: Path) -> None:
    names = []
    for first_step in (0, 1):
        monitor = Monitor(tmp_path, first_step)
        monitor.config("")
        monitor.close()
        names.append({path.name for path in tmp_path.iterdir()})
    (later,) = names[1] - names[0]
    assert all(later.split(".")[3] > name.split(".")[3] for name in names[0])
