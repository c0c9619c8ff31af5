"""`dd.sweep`: the space, trials as run directories, going on, sharing, and what is told."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import GIN, arguments, contents, one_error, process

from bilevel import ConfigurationError
from dd import config, evaluate, sweep
from dd.search.space import SPACES, Parameter, parameter, space

optuna = pytest.importorskip("optuna")
from dd.search.study import open_study  # noqa: E402, which needs optuna

VARY = "--vary=Distiller.image_lr = log(1e-3, 1)"


def words(folder: Path, *more: str, **changes: Any) -> list[str]:
    changes = {"Evaluator__full_data_networks": 0, **changes}
    return [*arguments(None, **changes), f"--sweep_dir={folder}", "--looks=2", *more]


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


# The study.


def test_no_trial_that_waits_is_begun_twice(tmp_path: Path) -> None:
    """By four threads, each with connections of its own, as processes have."""
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    study = open_study(url, "study", {})
    for _ in range(24):
        study.enqueue_trial({})
    begun: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        begun.append(trial.number)
        return 0.0

    def work(_: int) -> None:
        open_study(url, "study", {}).optimize(objective, n_trials=6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(begun) == list(range(24))


# The space.


@given(low=st.floats(1e-6, 1), factor=st.floats(1.1, 1e3))
def test_bounds_are_read_as_they_are_written(low: float, factor: float) -> None:
    high = low * factor
    assert parameter(f"a.b = log({low!r}, {high!r})") == Parameter("a.b", "log", (low, high))


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("a = choice(1, 2.5, 'x')", ("1", "2.5", "'x'")),
        ("a = choice(@Full(), @RandomWindow())", ("@Full()", "@RandomWindow()")),
        ("a = choice([1, 2], (3, 4), 'b, c')", ("[1, 2]", "(3, 4)", "'b, c'")),
        ("a = integer(2, 7)", (2, 7)),
        ("a=uniform( -1 , 1.5 )", (-1, 1.5)),
    ],
)
def test_a_line_says_what_values_there_are(line: str, values: tuple[object, ...]) -> None:
    assert parameter(line).values == values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Distiller.image_lr", "NAME = log"),
        ("a = lgo(1, 2)", "NAME = log"),
        ("a = log(1)", "NAME = log"),
        ("a = uniform(x, 2)", "NAME = log"),
        ("a = choice()", "NAME = log"),
        ("a = log(0, 1)", "LOW must be below HIGH, and be positive"),
        ("a = uniform(2, 1)", "LOW must be below HIGH"),
        ("a = integer(1, 2.5)", "integers"),
    ],
)
def test_a_line_that_says_nothing_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parameter(line)


def test_a_file_has_lines_and_comments_and_a_single_line_counts_instead(tmp_path: Path) -> None:
    path = tmp_path / "my.space"
    path.write_text("# rates\na = log(1e-3, 1)  # of images\n\nb = choice(1, 2)\n")
    found = space([str(path)], ["a = log(0.5, 1)"])
    assert [str(each) for each in found] == ["a = log(0.5, 1)", "b = choice(1, 2)"]
    with pytest.raises(ConfigurationError, match="nothing is varied"):
        space([], [])


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.space")), ids=lambda path: path.stem)
def test_every_value_of_a_space_that_comes_with_dd_is_one_that_its_recipe_takes(path: Path) -> None:
    recipe = [str(GIN / "cifar10_at_cpu.gin")]
    data = ["Experiment.dataset = @digits()", "StageAware.transition = @ByMetric()"]
    for each in space([path.stem], []):
        for value in each.values:
            config.load(recipe, [*data, "ConvNet.depth = 1", f"{each.name} = {value}"])


# A search.


def test_trials_are_run_directories_and_the_best_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else all trials may draw what is wrong.
    seeded = partial(optuna.samplers.TPESampler, seed=0)
    monkeypatch.setattr(optuna.samplers, "TPESampler", seeded)
    folder = tmp_path / "sweep"
    choice = "--vary=SyntheticDataset.start = choice('real', 'noise', 'wrong')"
    assert sweep.main(words(folder, VARY, choice, "--trials=4")) == 0
    shown, found = capsys.readouterr().out, found_in(folder)
    rows = found["trials"]
    assert len(rows) == 4
    assert [row["accuracy"] or 0 for row in rows] == sorted(
        (row["accuracy"] or 0 for row in rows), reverse=True
    )
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert f"\n{row['trial']} " in shown
        wrong = row["parameters"]["SyntheticDataset.start"] == "'wrong'"
        assert (row["status"] == "failed") == wrong
        assert (folder / row["trial"] / "distilled.safetensors").exists() == (not wrong)
    # No trial has seen the test set; the best one can be judged on it by the command.
    assert not list(folder.glob("*/results.json"))
    assert evaluate.main([str(folder / rows[0]["trial"]), "--only=distilled"]) == 0
    # Nothing is left to do.
    before = contents(folder / rows[0]["trial"])
    assert sweep.main(words(folder, VARY, choice, "--trials=4")) == 0
    assert found_in(folder) == found
    assert contents(folder / rows[0]["trial"]) == before


def test_a_search_of_something_else_does_not_join(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert sweep.main(words(folder, VARY, "--trials=1")) == 0
    for other in (
        words(folder, "--vary=Distiller.image_lr = log(1e-2, 1)", "--trials=1"),
        words(folder, VARY, "--trials=1", ConvNet__width=9),
    ):
        capsys.readouterr()
        assert sweep.main(other) == 2
        assert "the study 'sweep'" in one_error(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing is varied"),
        (["--vary=Distiller.image_rl = log(1, 2)"], "did you mean 'image_lr'"),
        ([VARY, "--trials=0"], "trials=0"),
        ([VARY, "--storage=nowhere://x"], "--storage=nowhere://x cannot be used"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(words(tmp_path / "sweep", *more)) == 2
    assert message in one_error(capsys)


@pytest.mark.slow
def test_a_search_that_is_killed_and_stopped_is_ended_by_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = ["dd.sweep", *words(folder, VARY, "--trials=8", Distiller__outer_steps=60)]
    for stop in (signal.SIGKILL, signal.SIGINT):
        running = process(tmp_path, *command)
        begun = len(list(folder.glob("trial-*")))
        deadline = time.monotonic() + 100
        while len(list(folder.glob("trial-*"))) < begun + 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        running.send_signal(stop)
        running.communicate(timeout=60)
    both = [process(tmp_path, *command) for _ in range(2)]
    for each in both:
        out, err = each.communicate(timeout=300)
        assert each.returncode == 0, err
        assert "best accuracy on the validation split" in out
    rows = found_in(folder)["trials"]
    assert len(rows) in (8, 9)  # two processes may begin the last one at once
    assert {row["status"] for row in rows} <= {"complete", "pruned"}
    assert len({row["trial"] for row in rows}) == len(rows)
