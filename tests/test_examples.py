"""Every example runs as a user runs it, and its table supports what it claims."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def table(name, tmp_path):
    """Run an example with --quick: its table as {first column: {column: number}}."""
    picture = tmp_path / "picture.png"
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick", "--out", str(picture)],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    header, *rows = (re.split(r" {2,}", line) for line in process.stdout.strip().split("\n"))
    return {
        first: dict(zip(header[1:], map(float, numbers), strict=True)) for first, *numbers in rows
    }


def test_every_example_is_one_short_file_with_a_test():
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 150, file.name
        assert f'table("{file.name}", tmp_path)' in Path(__file__).read_text(), file.name


@pytest.mark.slow
def test_many_weight_decays_beat_the_best_single_one(tmp_path):
    rows = table("weight_decays.py", tmp_path)
    grid, implicit = rows["one decay, grid"], rows["650 decays, Implicit"]
    assert implicit["test loss"] < grid["test loss"] - 0.01
    assert implicit["validation loss"] < rows["650 decays, random search"]["validation loss"] / 2
    # At the inner optimum both estimators compute the same number.
    assert implicit["validation loss"] == pytest.approx(
        rows["650 decays, Adjoint"]["validation loss"], rel=0.02
    )


@pytest.mark.slow
def test_weights_find_the_wrong_labels(tmp_path):
    rows = table("data_cleaning.py", tmp_path)
    uncleaned = rows["all examples alike"]["test accuracy"]
    assert rows["weighted, Adjoint"]["found"] > 0.8
    assert rows["weighted, Adjoint, last 10"]["found"] > 0.9
    assert rows["weighted, Adjoint, last 10"]["test accuracy"] > uncleaned + 0.01
    assert rows["right labels alone (not known)"]["test accuracy"] > uncleaned + 0.03


@pytest.mark.slow
def test_learned_initialisations_need_few_examples(tmp_path):
    rows = table("few_shot.py", tmp_path)
    start = rows["regression, random initialisation"]["error"]
    assert rows["regression, MAML, Adjoint"]["error"] < 0.6 * start
    assert rows["regression, implicit MAML, Implicit"]["error"] < 0.8 * start
    start = rows["classification, random initialisation"]["error"]
    assert rows["classification, implicit MAML, Implicit"]["error"] < 0.7 * start


@pytest.mark.slow
def test_learned_sequences_train_a_recurrent_network(tmp_path):
    rows = table("recurrent.py", tmp_path)
    real = rows["real sequences"]["accuracy"]
    assert rows["StageAware, Adjoint"]["accuracy"] > real + 0.02
    assert rows["Full, Adjoint"]["peak MB"] < 0.5 * rows["Full, Reverse"]["peak MB"]


@pytest.mark.slow
def test_averaged_hypergradients_suit_every_client(tmp_path):
    rows = table("federated.py", tmp_path)
    learned = rows["hypergradients, Adjoint"]["personalised"]
    assert learned > rows["federated averaging"]["personalised"] + 0.05
    assert learned == pytest.approx(
        rows["hypergradients, FiniteDifference"]["personalised"], abs=0.02
    )


@pytest.mark.slow
def test_a_learned_schedule_beats_the_best_constant_rate(tmp_path):
    rows = table("learned_schedule.py", tmp_path)
    constant = rows["best constant rate of 11"]["test loss"]
    assert rows["learned, Adjoint"]["test loss"] < constant - 0.03


@pytest.mark.slow
def test_a_folder_of_pictures_is_distilled_from_python(tmp_path):
    rows = table("distil_your_own.py", tmp_path)
    learned, real = rows["10 learned images"], rows["10 real images"]
    assert learned["test accuracy"] > real["test accuracy"] + 0.02


def test_the_notebook_of_the_docs_runs_on_a_folder_of_pictures(tmp_path, monkeypatch, capsys):
    path = EXAMPLES.parent / ".ci" / "notebook_pages.py"
    spec = importlib.util.spec_from_file_location("notebook_pages", path)
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    cells = pages.cells_of((EXAMPLES / "distil_your_own.py").read_text())
    page = pages.as_page("distil_your_own", cells)
    assert page.startswith("# Distil your own pictures")
    assert page.count("```python\n") == page.count("\n## ") == len(cells) - 1

    for index, colour in enumerate(["darkred", "navy", "olive"]):
        folder = tmp_path / "photos" / colour
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (12, 9), colour).rotate(number + index).save(folder / f"{number}.png")
    words = ["--photos", str(tmp_path / "photos"), "--outer_steps=2", "--out"]
    monkeypatch.setattr(sys, "argv", ["notebook", *words, str(tmp_path / "picture.png")])
    names = {"__name__": "__main__"}
    for cell in pages.as_notebook(cells)["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    shown = capsys.readouterr().out
    assert names["distilled"].class_names == ("darkred", "navy", "olive")
    assert re.search(r"^3 learned images +[01]\.\d{3} ", shown, re.MULTILINE)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size[0] > 30
