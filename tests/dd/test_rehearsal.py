"""What a run will take: told before it is begun, and when a CPU will not finish it."""

import re
from pathlib import Path

import pytest
from tiny_runs import OUTER_STEPS, arguments, shown_in

from dd import train
from dd.gin_text import RECIPES, recipe_for_cpu


@pytest.mark.parametrize("minutes", [None, 5])
def test_a_dry_run_tells_what_to_expect_and_writes_nothing(
    minutes: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    changes = {"Distiller__outer_steps": 10**6, "Distiller__minutes": minutes}
    assert train.main([*arguments(run, **changes), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert not run.exists()
    assert "nothing was written" in printed
    assert re.search(r"first outer step: [\d.]+ s; each after it: about [\d.]+ s", printed)
    expected = r"5 min" if minutes else r"[\d.]+ (h|days)"
    assert re.search(rf"distilling: about {expected}", printed)
    assert re.search(r"networks: about .* on distilled, .* on random real, .* full data", printed)
    assert re.search(r"memory: \d\.\d\d GiB of the process", printed)


def test_a_dry_run_of_days_names_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path / "run", Distiller__outer_steps=10**9)
    assert train.main([*words, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (early, late) = [line for line in lines if "days on this CPU; Distiller.minutes ends" in line]
    assert early.startswith("warning: this run takes at least ")
    assert lines.index(early) < lines.index("taking an outer step") < lines.index(late)


@pytest.mark.parametrize("bound", ["at least ", ""])
def test_a_run_that_a_cpu_will_not_finish_says_so(
    bound: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bound:
        monkeypatch.setattr("dd.distillation.recorder.least_seconds", lambda _: 0.0)
    monkeypatch.setattr("dd.distillation.recorder.LONG", 0.0)
    assert train.main(arguments(tmp_path / "run")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: this run" in line]
    assert len(said) == 1
    pattern = rf"takes {bound}\d+ s on this CPU; Distiller.minutes"
    assert re.search(pattern, said[0])
    shown = shown_in(tmp_path / "run")
    assert shown.Scalars("accuracy/distilled")[0].step == OUTER_STEPS
    assert {"charts/window", "charts/inner_loss"} <= set(shown.Tags()["images"])


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cifar10", "cifar10_cpu"),
        ("gin/cifar10.gin", "cifar10_cpu"),
        ("cifar10_at", "cifar10_at_cpu"),
        ("gin/cifar10_rat.gin", "cifar10_cpu"),
        ("tiny_imagenet_ipc1", "tiny_imagenet_cpu"),
        ("cifar10_cpu", None),
        ("own.gin", None),
    ],
)
def test_the_recipe_made_for_a_cpu_is_named(name: str, recipe: str | None) -> None:
    assert recipe_for_cpu(name) == recipe
    assert recipe is None or (RECIPES / f"{recipe}.gin").is_file()
