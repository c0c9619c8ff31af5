"""`dd.evaluate`: a run again, other architectures, scores, comparisons, and sets of others."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    SNAPSHOT,
    arguments,
    command,
    contents,
    one_error,
    results_of,
    run_command,
)

from dd import config, evaluate, train
from dd.data import Standardize
from dd.evaluation.comparison import by_dataset, comparison_plot, comparison_table
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.foreign_set import load_foreign_set
from dd.runtime.files import DamagedFileError

OLD_RUN = Path(__file__).with_name("run_of_0.1")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    assert train.main(arguments(folder, SyntheticDataset__learn_labels=True)) == 0
    return folder


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


@pytest.fixture
def judged(run_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates the run, with further arguments; what was found."""

    def call(*words: str) -> dict[str, Any]:
        path = tmp_path / "found.json"
        assert evaluate.main([str(run_dir), f"--json={path}", *words]) == 0
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    return call


# A whole run.


def test_evaluating_a_run_again_gives_the_same_results(copy: Path) -> None:
    before, expected = contents(copy), results_of(copy)
    done = command(copy.parent, "dd.evaluate", "run")
    assert done.returncode == 0, done.stderr
    found = results_of(copy)
    for results in (found, expected):
        results["wall_clock_seconds"].pop("evaluating")
    assert found.pop("command").endswith("-m dd.evaluate run")
    expected.pop("command")
    assert found == expected
    for name in ("random real", "distilled", "full data"):
        assert re.search(rf"^{name} .*±.*%", done.stdout, re.MULTILINE)
    changed = {name for name, content in contents(copy).items() if content != before.get(name)}
    assert changed == {"results.json"}


def test_evaluating_a_snapshot_leaves_the_results_of_the_run(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    words = [str(copy), f"--set={copy / SNAPSHOT}", "--gin_param=Evaluator.networks = 3"]
    assert evaluate.main(words) == 0
    after = contents(copy)
    assert after.keys() - before.keys() == {
        "results-0.0001_minutes.json",
        "confusion-0.0001_minutes.png",
    }
    assert {name: after[name] for name in before} == before
    results = json.loads(after["results-0.0001_minutes.json"])
    networks = {name: found["networks"] for name, found in results["accuracy"].items()}
    assert networks == {"random_real": 3, "distilled": 3, "full_data": 1}
    assert results["outer_steps"] == 1
    assert results["distilled_set"]["file"] == SNAPSHOT.name
    assert "distilled" in capsys.readouterr().out


def test_results_can_go_elsewhere(copy: Path) -> None:
    before = contents(copy)
    assert evaluate.main([str(copy), f"--json={copy.parent / 'mine.json'}"]) == 0
    assert json.loads((copy.parent / "mine.json").read_text())["status"] == "complete"
    assert contents(copy) == before


def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert evaluate.main([str(folder)]) == 2
        assert f"{folder} is no run directory" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "another kind"])
def test_a_set_that_cannot_be_read_is_one_line(
    damage: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "distilled.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.copy(copy / "checkpoint.safetensors", path)
    before = contents(copy)
    assert evaluate.main([str(copy)]) == 2
    assert "distilled.safetensors" in one_error(capsys)
    assert contents(copy) == before


def test_a_set_of_another_dataset_is_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "distilled.safetensors"
    found = DistilledSet.load(path)
    DistilledSet(
        found.images, found.labels, found.transform, tuple("abcdefghij"), found.provenance
    ).save(path)
    assert evaluate.main([str(copy)]) == 2
    assert "digits has others" in one_error(capsys)


def test_evaluation_with_another_split_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed of the split would put images that were trained on among the test images."""
    before = (copy / "results.json").read_text()
    assert evaluate.main([str(copy), "--gin_param=digits.seed = 1"]) == 2
    assert "digits.seed was 0, now 1" in capsys.readouterr().err
    assert (copy / "results.json").read_text() == before


# Judged otherwise.


def test_a_set_is_judged_by_other_architectures_as_they_are_configured(
    judged: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(
        "--only=distilled",
        "--architectures=ViT,ConvNet",
        "--gin_param=ViT.width = 8",
        "--gin_param=ViT.depth = 1",
    )
    assert set(found["architectures"]) == {"ViT", "ConvNet"}
    accuracy = found["architectures"]["ViT"]["distilled"]
    assert len(accuracy["values"]) == 2
    # The run's own network, once more.
    assert found["architectures"]["ConvNet"]["distilled"] == found["accuracy"]["distilled"]
    assert "on ViT" in capsys.readouterr().out


def test_a_set_is_judged_by_a_wider_network_than_it_was_distilled_with(
    judged: Callable[..., dict[str, Any]],
) -> None:
    same, wider = (
        judged("--only=distilled", f"--gin_param=ConvNet.width = {width}") for width in (8, 16)
    )
    values = [found["accuracy"]["distilled"]["values"] for found in (same, wider)]
    assert values[0] != values[1]
    assert same["network_parameters"] < wider["network_parameters"]
    small = ["--gin_param=ViT.width = 8", "--gin_param=ViT.depth = 1"]
    other = judged("--only=distilled", "--gin_param=Experiment.network = @ViT", *small)
    assert other["network"] == "ViT"


def test_progress_counts_the_steps_of_training_and_the_networks_that_are_tested(
    judged: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    judged("--only=distilled")
    shown = capsys.readouterr().err
    assert re.search(r"training on distilled: 100%.* 10/10 .*step", shown)
    assert re.search(r"testing distilled: 100%.* 2/2 .*network", shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--architectures=ResNet"], "'ResNet'; did you mean 'ResNet18'?"),
        (["--architectures=VGG11"], "image_size=8: it must be an integer in [32, "),
        (["--scores", "--gin_param=Evaluator.full_data_networks = 0"], "full_data_networks"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    words: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run_dir), *words]) == 2
    assert message in one_error(capsys)


def test_scores_and_hard_labels(judged: Callable[..., dict[str, Any]]) -> None:
    found = judged("--only=distilled", "--scores")
    assert set(found["scores"]) == {"label_robust", "augmentation_robust"}
    assert all(0 <= score <= 1 for score in found["scores"].values())
    assert judged("--only=distilled", "--hard_labels")["scores"] is None


def test_runs_are_compared_in_one_table_and_one_picture(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    words = [str(run_dir), f"--compare={run_dir}", f"--plot={plot}"]
    assert evaluate.main(words) == 0
    printed = capsys.readouterr().out
    mean = json.loads((run_dir / "results.json").read_text())["accuracy"]["distilled"]["mean"]
    assert f"{100 * mean:.1f} ±" in printed
    assert "bptt" in printed
    with Image.open(plot) as picture:
        assert picture.size[0] > 200
    assert evaluate.main([str(run_dir), f"--compare={tmp_path}"]) == 2
    assert "results.json does not exist" in capsys.readouterr().err
    assert f"\n{run_dir}: python " in printed  # where the figures come from


def results(dataset: str, data: str | None = "1") -> dict[str, Any]:
    accuracy = {"distilled": {"mean": 0.5, "std": 0.1}}
    found = {"accuracy": accuracy, "images_per_class": 1, "protocol": "bptt", "dataset": dataset}
    return found if data is None else {**found, "data": data}


@pytest.mark.parametrize(
    ("runs", "tables"),
    [
        ([("a", "1"), ("a", "1"), ("a", None)], [["0", "1", "2"]]),
        ([("a", "1"), ("b", "1"), ("a", "1")], [["0", "2"], ["1"]]),
        ([("a", "1"), ("a", "2"), ("a", "2")], [["0"], ["1", "2"]]),
        ([("a", None), ("b", None)], [["0"], ["1"]]),
    ],
)
def test_runs_on_different_datasets_share_no_table(
    runs: list[tuple[str, str | None]], tables: list[list[str]]
) -> None:
    found = {str(index): results(*run) for index, run in enumerate(runs)}
    assert [list(group) for group in by_dataset(found).values()] == tables
    assert comparison_table(found).count("images per class") == len(tables)
    assert comparison_plot(found)[:4] == b"\x89PNG"


def test_no_judgement_overwrites_another(copy: Path, tmp_path: Path) -> None:
    torch.save(torch.rand(10, 1, 8, 8), tmp_path / "set.pt")
    (tmp_path / "more").mkdir()
    torch.save(torch.rand(10, 1, 8, 8), tmp_path / "more" / "set.pt")
    small = ["--gin_param=ViT.width = 8", "--gin_param=ViT.depth = 1"]
    dc = ["--gin_param=Evaluator.protocol = @DCProtocol()", "--gin_param=DCProtocol.epochs = 2"]
    for words in (
        ["--only=distilled", "--gin_param=ConvNet.width = 4"],
        ["--only=distilled", "--gin_param=ConvNet.width = 5"],
        ["--only=distilled", *dc],
        ["--only=distilled"],
        ["--only=distilled", "--hard_labels"],
        ["--only=distilled", f"--set={tmp_path / 'set.pt'}"],
        ["--only=distilled", f"--set={tmp_path / 'more' / 'set.pt'}"],
        ["--only=distilled", "--architectures=ViT", *small],
        ["--only=distilled", "--architectures=ViT", *small, "--gin_param=ViT.heads = 2"],
        ["--only=distilled", "--baselines=random", "--gin_param=Evaluator.teacher_steps = 2"],
        ["--only=distilled", "--scores"],
    ):
        before = {path: path.read_bytes() for path in copy.iterdir() if path.is_file()}
        assert evaluate.main([str(copy), *words]) == 0
        (name,) = [path.name for path in copy.glob("results*.json") if path not in before]
        assert all(path.read_bytes() == content for path, content in before.items())
        if words[1:] == dc:
            assert name.startswith("results-ConvNet-dc-distilled-")
        if words[1:2] == ["--architectures=ViT"]:
            assert name.startswith("results-distilled-architectures-ViT-")
        if "--baselines=random" in words:
            assert name == "results-distilled-baselines-random.json"


def test_the_same_command_again_keeps_what_it_does_not_come_to(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--architectures=ConvNet", "--baselines=random"]
    words = [str(copy), *more, "--gin_param=Evaluator.teacher_steps = 2"]
    assert evaluate.main(words) == 0
    (path,) = copy.glob("results-*.json")
    before = json.loads(path.read_text())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "random_real", interrupt)
        assert run_command(evaluate, words) == 130
    after = json.loads(path.read_text())
    assert after["status"] == "interrupted"
    for name in ("accuracy", "architectures", "baselines"):
        assert after[name] == before[name]
    # Of another set nothing is kept.
    other = DistilledSet.load(copy / "distilled.safetensors")
    replace(other, images=other.images + 1).save(copy / "distilled.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "random_real", interrupt)
        assert run_command(evaluate, words) == 130
    after = json.loads(path.read_text())
    assert after["accuracy"]["random_real"] is None
    assert after["baselines"] == {}


def test_judgements_of_a_run_have_rows_of_their_own(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(copy), "--only=distilled", "--gin_param=ConvNet.width = 4"]) == 0
    (path,) = copy.glob("results-*.json")
    capsys.readouterr()
    assert evaluate.main([str(copy), f"--compare={path}", f"--plot={tmp_path / 'p.png'}"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "network" in header
    for name, row in zip((copy, path), rows, strict=False):
        found = json.loads((name / "results.json" if name == copy else name).read_text())
        assert row.startswith(f"{name} ")
        assert f"ConvNet, {found['network_parameters']:,} parameters" in row


def test_each_class_has_its_accuracy(
    judged: Callable[..., dict[str, Any]], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged("--only=distilled")
    classes = found["accuracy"]["distilled"]["per_class"]
    assert found["class_names"] == [str(digit) for digit in range(10)]
    assert len(classes) == 10
    saved = config.saved_text(run_dir / "config.gin")
    counts = torch.bincount(config.load([], [], saved=saved).dataset.test_labels)
    mean = (
        sum(of * count for of, count in zip(classes, counts.tolist(), strict=True)) / counts.sum()
    )
    assert mean == pytest.approx(found["accuracy"]["distilled"]["mean"])
    assert f"distilled, each class, %: 0 {100 * classes[0]:.0f}, 1 " in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["random_real", "full_data", "teacher"])
def test_what_cannot_be_measured_beside_a_set_costs_nothing_else(
    failing: str,
    judged: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not enough memory:\n you tried to allocate 9 bytes")

    monkeypatch.setattr(Evaluator, failing, fail)
    found = judged("--baselines=random", "--gin_param=Evaluator.teacher_steps = 2")
    assert found["status"] == "complete"
    assert found["accuracy"]["distilled"]["mean"] > 0
    name = "baselines" if failing == "teacher" else failing
    assert found["problems"] == {name: "not enough memory: you tried to allocate 9 bytes"}
    assert found["accuracy"].get(failing) is None
    assert f"{name.replace('_', ' ')} could not be measured: not enough" in capsys.readouterr().out


def test_a_set_that_cannot_be_measured_is_an_error(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("nothing to train on")

    monkeypatch.setattr(Evaluator, "distilled", fail)
    assert evaluate.main([str(run_dir), "--json=found.json"]) == 2
    assert "nothing to train on" in one_error(capsys)


# What others made.


class Digits:
    """The little that is needed of a dataset."""

    name = "mine"
    num_classes = 2
    class_names = ("no", "yes")
    image_shape = (1, 2, 2)


DATASET: Any = Digits()
TRANSFORM = Standardize([0.5], [0.25])


@pytest.mark.parametrize("form", ["dict", "pair", "images"])
@pytest.mark.parametrize("values", ["pixels", "transformed"])
def test_tensors_of_others_are_read(form: str, values: str, tmp_path: Path) -> None:
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
    held = {"dict": {"images": images, "labels": labels}, "pair": (images, labels)}
    torch.save(held.get(form, images), tmp_path / "set.pt")
    found = load_foreign_set(tmp_path / "set.pt", DATASET, TRANSFORM, values)
    expected = TRANSFORM(images) if values == "pixels" else images
    torch.testing.assert_close(found.images, expected)
    assert torch.equal(found.labels, labels)
    assert found.class_names == ("no", "yes")


@pytest.mark.parametrize("values", ["pixels", "transformed"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {},
        {"labels": np.array([0, 0, 1, 1])},
        {"labels": np.array(["no", "no", "yes", "yes"])},
        {"labels": np.array([1, 1, 0, 0]), "class_names": np.array(["yes", "no"])},
        {"labels": np.eye(2, dtype=np.uint8)[[0, 0, 1, 1]]},
        {"labels": np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]},
    ],
)
def test_arrays_of_others_are_read(
    content: dict[str, Any], last: bool, values: str, tmp_path: Path
) -> None:
    images = torch.rand(4, 1, 2, 2)
    held = images.movedim(1, 3) if last else images
    np.savez(tmp_path / "set.npz", images=held.numpy(), **content)
    found = load_foreign_set(tmp_path / "set.npz", DATASET, TRANSFORM, values)
    torch.testing.assert_close(found.images, TRANSFORM(images) if values == "pixels" else images)
    hard = found.labels.argmax(1) if found.labels.is_floating_point() else found.labels
    assert hard.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": np.array(["no", "no", "maybe", "yes"])}, "there is no class 'maybe'"),
        ({"labels": np.arange(4) % 2, "class_names": np.array(["a", "b"])}, "its classes are"),
        ({"labels": np.array([0, 0, 1, 2])}, "labels outside"),
        ({"images": np.full((4, 2, 2), 255.0)}, "must lie in"),
        ({"images": np.full((4, 2, 2), "a")}, "images has dtype"),
        ({"images": None, "labels": np.arange(4)}, "'images' is missing"),
        ({"images": np.zeros((4, 3, 3))}, r"has \(1, 2, 2\)"),
    ],
)
def test_arrays_of_others_that_do_not_fit_are_named(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    held = {"images": np.zeros((4, 2, 2)), **content}
    np.savez(tmp_path / "set.npz", **{name: v for name, v in held.items() if v is not None})
    with pytest.raises(ValueError, match=rf"set\.npz.*{message}"):
        load_foreign_set(tmp_path / "set.npz", DATASET, TRANSFORM, "pixels")


def test_a_set_that_is_not_there_is_said_before_anything_is_read(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "load", lambda *_, **__: pytest.fail("it is read"))
    for name in ("absent.pt", "absent.safetensors", "absent"):
        assert evaluate.main([str(run_dir), f"--set={name}"]) == 2
        assert f"--set={name}: there is no such file or folder" in one_error(capsys)


@pytest.mark.parametrize("labels", [[[0], [0], [1], [1]], [0.0, 0.0, 1.0, 1.0], [[0.0]] * 4])
def test_labels_of_others_are_whole_numbers_of_any_type(
    labels: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save((torch.rand(4, 1, 2, 2), torch.tensor(labels)), tmp_path / "set.pt")
    found = load_foreign_set(tmp_path / "set.pt", DATASET, TRANSFORM, "pixels")
    assert torch.equal(found.labels, torch.tensor(labels).flatten().long())
    one_class = bool((found.labels == 0).all())
    assert ("set.pt has images of 1 of the 2 classes" in caplog.text) == one_class


def test_pictures_of_others_that_show_nothing_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(torch.ones(4, 1, 2, 2), tmp_path / "set.pt")
    load_foreign_set(tmp_path / "set.pt", DATASET, TRANSFORM, "pixels")
    assert "4 of 4 images of set.pt that were looked at are of one colour" in caplog.text


def test_a_folder_of_images_is_read(tmp_path: Path) -> None:
    for name, value in (("yes", 255), ("no", 0)):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (2, 2), value).save(tmp_path / "set" / name / "1.png")
    found = load_foreign_set(tmp_path / "set", DATASET, TRANSFORM, "pixels")
    for image, label in zip(found.images, found.labels, strict=True):
        torch.testing.assert_close(image, torch.full((1, 2, 2), 2.0 if label else -2.0))


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was_run"),))


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"images": Malicious()}, "set.pt")
    with pytest.raises(DamagedFileError, match=r"set\.pt holds more than tensors"):
        load_foreign_set(Path("set.pt"), DATASET, TRANSFORM, "pixels")
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.rand(4, 3, 2, 2), r"images of shape \(4, 3, 2, 2\); mine has \(1, 2, 2\)"),
        (torch.rand(3, 1, 2, 2), "3 images without labels"),
        ((torch.rand(2, 1, 2, 2), torch.tensor([0, 2])), "labels outside 0 … 1"),
        ((torch.rand(2, 1, 2, 2), torch.rand(2, 3)), r"labels of shape \(2, 3\)"),
        ((torch.rand(2, 1, 2, 2), torch.tensor([0.0, 0.5])), r"float32 labels of shape \(2,\)"),
        ((torch.rand(2, 1, 2, 2), torch.tensor([0.0, torch.nan])), r"labels of shape \(2,\)"),
        ({"image": torch.rand(2, 1, 2, 2)}, "must hold a dict with tensors images"),
    ],
)
def test_what_does_not_fit_is_named(held: Any, message: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "set.pt")
    with pytest.raises(ValueError, match=message):
        load_foreign_set(tmp_path / "set.pt", DATASET, TRANSFORM, "pixels")


def test_another_set_of_a_run_and_anothers_are_told_apart(
    run_dir: Path, judged: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    ours = DistilledSet.load(run_dir / "distilled.safetensors")
    torch.save({"images": ours.images, "labels": ours.labels}, tmp_path / "theirs.pt")
    words = [f"--set={tmp_path / 'theirs.pt'}", "--values=transformed", "--only=distilled"]
    theirs = judged(*words)
    assert theirs["accuracy"]["distilled"] == judged("--only=distilled")["accuracy"]["distilled"]
    assert theirs["distilled_set"]["foreign"] == "theirs.pt"


def test_a_set_of_version_0_1_is_judged_as_another_set_of_a_run(
    judged: Callable[..., dict[str, Any]],
) -> None:
    found = judged(f"--set={OLD_RUN / 'distilled.safetensors'}", "--only=distilled")
    assert found["outer_steps"] == 3
    assert found["accuracy"]["distilled"]["networks"] == 2


def test_a_run_of_version_0_1_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate.main([str(OLD_RUN)]) == 2
    message = one_error(capsys)
    assert f"{OLD_RUN} holds a run of version 0.1" in message
    assert "--set" in message
