"""Sets that come with `dd`, and sets that go: found by name, exported, and read back."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import one_error, run_command
from torch import Tensor
from torchvision.datasets import ImageFolder

import dd
from dd import evaluate, export
from dd.data import Standardize
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.names import EXPORT_FORMATS
from dd.exchange.export import FORMATS
from dd.exchange.shipped import find_set
from dd.runtime.files import write_json

MADE_OF = {"dataset": "noise", "outer_step": 3}
RESULTS: dict[str, Any] = {
    "network": "ConvNet",
    "protocol": "bptt",
    "distilled_set": {"outer_step": 3},
    "accuracy": {"distilled": {"mean": 0.5, "std": 0.1, "networks": 2, "steps": 7}},
}


def a_set(soft: bool = True) -> DistilledSet:
    """Pixels partly outside [0, 1]; the class of an image is not its index."""
    torch.manual_seed(0)
    transform = Standardize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    labels = torch.rand(6, 3).add(torch.eye(3).roll(1, 0).repeat(2, 1) * 2)
    hard = labels.argmax(dim=1)
    return DistilledSet(
        images=torch.randn(6, 3, 5, 5) * 3,
        labels=labels if soft else hard,
        transform=transform,
        class_names=("a cat", "dög", "c"),
        provenance=MADE_OF,
        recipe={"network": {"name": "ConvNet", "arguments": {}}, "steps": 9, "batch_size": 4},
    )


def rounded(distilled: DistilledSet) -> Tensor:
    return distilled.pixels().clamp(0, 1).mul(255).round().byte()


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.mark.parametrize("soft", [False, True])
def test_every_form_gives_back_what_it_says(soft: bool, tmp_path: Path) -> None:
    distilled = a_set(soft)
    places = {name: dd.export_set(distilled, tmp_path / name, name) for name in FORMATS}
    back = dd.load(places["safetensors"] / "distilled.safetensors")
    assert back.recipe == distilled.recipe
    assert back.class_names == distilled.class_names
    found = torch.load(places["pt"] / "distilled.pt", weights_only=True)
    arrays = np.load(places["npz"] / "distilled.npz", allow_pickle=False)
    ranking = places["ddranking"]
    for name in ("images", "labels"):
        expected = getattr(distilled, name)
        assert torch.equal(getattr(back, name), expected)
        assert torch.equal(found[name], expected)
        assert torch.equal(torch.from_numpy(arrays[name]), expected)
        assert torch.equal(torch.load(ranking / f"{name}.pt"), expected)
    assert torch.equal(found["pixels"], distilled.pixels())
    assert arrays["class_names"].tolist() == list(distilled.class_names)
    assert found["recipe"] == distilled.recipe

    classes = (distilled.labels.argmax(dim=1) if soft else distilled.labels).tolist()
    pictures = ImageFolder(str(places["folder"] / "pictures"))
    assert {Path(path).name: pictures.classes[label] for path, label in pictures.samples} == {
        f"{index:05}.png": distilled.class_names[label] for index, label in enumerate(classes)
    }
    train = places["datasets"] / "train"
    lines = [json.loads(line) for line in (train / "metadata.jsonl").read_text().splitlines()]
    for line, label, pixels in zip(lines, classes, rounded(distilled), strict=True):
        assert line["label"] == label
        assert torch.equal(picture(train / line["file_name"]), pixels)
        assert ("soft_label" in line) == soft
    assert dd.load(places["datasets"]).recipe == distilled.recipe
    for place in places.values():
        text = (place / "README.md").read_text()
        assert "y = (x - mean[:, None, None]) / std[:, None, None]" in text
        assert (place / "preview.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_the_results_along_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a_set().save("run/distilled.safetensors")
    write_json(Path("run/results.json"), RESULTS)
    assert export.main(["run"]) == 0
    assert dd.load("run-safetensors").recipe["measured"]["mean"] == 0.5
    assert dd.load("run-safetensors").recipe["steps"] == 7
    assert "50.0 ± 10.0 %" in Path("run-safetensors/README.md").read_text()

    capsys.readouterr()
    assert export.main(["run"]) == 2
    assert "--overwrite" in one_error(capsys)
    assert export.main(["run", "--overwrite", "--format=npz", "--out=run-safetensors"]) == 0
    assert not Path("run-safetensors/distilled.safetensors").exists()
    before = sorted(Path("run").iterdir())
    capsys.readouterr()
    assert export.main(["run", "--overwrite", "--out=run"]) == 2
    assert "is no export" in one_error(capsys)
    assert sorted(Path("run").iterdir()) == before
    assert export.main(["digits-ipc"]) == 2
    assert "did you mean 'digits-ipc1'?" in one_error(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-safetensors"}


def test_a_form_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='png'.*'npz'"):
        dd.export_set(a_set(), tmp_path / "out", "png")
    transform = Standardize([0.5], [0.2])
    distilled = DistilledSet(torch.zeros(2, 1, 4, 4), torch.arange(2), transform, ("a/b", "c"), {})
    with pytest.raises(ValueError, match="'a/b' cannot be the name of a folder"):
        dd.export_set(distilled, tmp_path / "out", "folder")
    assert list(tmp_path.iterdir()) == []


def test_the_command_knows_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(FORMATS) == EXPORT_FORMATS
    assert run_command(export, ["--help"]) == 0
    assert "digits-ipc1" in capsys.readouterr().out


def test_every_set_that_ships_is_as_the_index_says() -> None:
    found = dd.sets()
    assert {f"{name}.safetensors" for name in found} == {
        path.name for path in find_set(next(iter(found))).parent.glob("*.safetensors")
    }
    for name, known in found.items():
        distilled = dd.load(name)
        measured = distilled.recipe["measured"]
        assert measured["mean"] == pytest.approx(known.accuracy, abs=1e-4)
        assert distilled.recipe["steps"] == known.steps
        assert known.data
        assert "/" not in str(distilled.recipe["config"]).replace("gin/", "")


def test_a_set_that_ships_is_judged_by_its_own_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--gin_param=Evaluator.networks = 1", "--gin_param=Evaluator.steps = [20]"]
    assert evaluate.main(["digits-ipc1", "--only=distilled", *short]) == 0
    results = json.loads(Path("results-digits-ipc1-distilled.json").read_text())
    assert results["accuracy"]["distilled"]["mean"] > 0.3
    a_set().save("theirs.safetensors")
    capsys.readouterr()
    assert evaluate.main(["theirs.safetensors"]) == 2
    assert "does not say how it was distilled" in one_error(capsys)
    assert evaluate.main(["digits-ipc1", "--gin_param=SyntheticDataset.start = 'real'"]) == 2
    assert "another configuration" in one_error(capsys)


@pytest.mark.parametrize(
    "line", ["import os", "Experiment.network = @os.system", "Experiment.seed = open('x')"]
)
def test_the_configuration_of_a_set_runs_nothing(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set.safetensors"
    found = dd.load("digits-ipc1")
    config = f"{line}\n{found.recipe['config']}{line}\n"
    replace(found, recipe={**found.recipe, "config": config}).save(path)
    assert evaluate.main([str(path), "--only=distilled"]) == 2
    assert f"the recipe of {path}" in one_error(capsys)


def test_what_is_asked_for_is_all_that_is_imported() -> None:
    program = "import dd, sys; dd.sets(); dir(dd); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
