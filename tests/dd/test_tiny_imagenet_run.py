"""Distilling a folder of images in patches, as a user runs it: caches, resuming, what is shown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import write_tiny_imagenet
from tiny_runs import arguments, curve, experiment, one_error, shown_in

from dd import evaluate, experts, train
from dd.distillation.loop import begin
from dd.evaluation.distilled_set import DistilledSet
from dd.objectives import RealImages
from dd.runtime.files import read_tensors

PATCHES = "tiny_imagenet_psp_cpu.gin"
#: 16×16 images of three classes, of which the network makes a map of 4×4, one place for each patch.
SMALL: dict[str, Any] = {
    "tiny_imagenet__image_size": 16,
    "Experiment__validation_fraction": 0.25,
    "Experiment__images_on": "host",
    "Experiment__transform": "@kip_whitening",
    "ConvNet__depth": 2,
    "ConvNet__width": 4,
    "SyntheticDataset__projection": "every_step",
    "PrototypeAlignment__weight": 1.0,
    "Distiller__outer_steps": 4,
    "Distiller__inner_steps": 4,
    "Distiller__validate_every": 2,
    "RealImages__real_batch": 5,
    "RealImages__real_micro_batch": 3,
    "Evaluator__networks": 1,
}
#: By recipe, its schedule on so short a run.
SCHEDULES = {
    PATCHES: {"RandomWindow__window": 2},
    "tiny_imagenet_ipc1.gin": {
        "StageAware__window": 2,
        "StageAware__width_range": 1,
        "StageAware__refresh": 2,
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_imagenet(tmp_path / "tiny-imagenet-3")


def words(root: Path, run_dir: Path | None, file: str = PATCHES, **changes: Any) -> list[str]:
    """The arguments of a command for a tiny run of the images in `root`."""
    return arguments(
        run_dir,
        file=file,
        **{**SMALL, **SCHEDULES[file], "tiny_imagenet__root": str(root), **changes},
    )


@pytest.mark.parametrize("file", SCHEDULES)
def test_a_run_in_patches(root: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "run"
    assert train.main(words(root, folder, file)) == 0

    distilled = DistilledSet.load(folder / "distilled.safetensors")
    assert distilled.images.shape == (3, 3, 16, 16)
    assert distilled.class_names == ("n03", "goldfish", "scorpion")
    patches = read_tensors(folder / "checkpoint.safetensors")[0]["outer.images"]
    assert patches.shape == (3 * 16, 3, 4, 4)
    torch.testing.assert_close(patches.flatten(1).norm(dim=1), torch.full((48,), 0.25))

    shown = shown_in(folder)
    values = {
        name: curve(shown, f"outer/{name}")
        for name in ("loss", "cross_entropy", "alignment_global", "alignment_local")
    }
    assert len(values["loss"]) == 4
    for loss, *parts in zip(*values.values(), strict=True):
        assert loss == pytest.approx(sum(parts), rel=1e-5)  # λ = 1
        assert all(part > 0 for part in parts)
    assert evaluate.main([str(folder), f"--json={tmp_path / 'results.json'}"]) == 0


def test_a_few_classes_aligned_by_the_features_of_an_expert(root: Path, tmp_path: Path) -> None:
    changes = {
        "PrototypeAlignment__experts": "@Experts()",
        "PrototypeAlignment__classes_per_step": 2,
        "Experts__folder": str(tmp_path / "experts"),
        "Experts__count": 1,
        "Experts__snapshots": 2,
        "Experts__batch_size": 4,
    }
    folder = tmp_path / "run"
    assert train.main(words(root, folder, **changes)) == 2
    assert not (folder / "distilled.safetensors").exists()
    assert experts.main(words(root, None, **changes)) == 0
    assert train.main(words(root, folder, **changes)) == 0

    # The last of its two snapshots makes the features, of two classes in every outer step.
    made = experiment(
        file=PATCHES, **SMALL, **SCHEDULES[PATCHES], **changes, tiny_imagenet__root=str(root)
    )
    run: Any = begin(made.distiller, made.task(made.prepare(), None))
    extractor = run.objective.problem.extractor
    snapshot = read_tensors(tmp_path / "experts" / "expert_0000.safetensors")[0]["snapshots"][2]
    assert torch.equal(torch.cat([part.flatten() for part in extractor.values()]), snapshot)
    assert isinstance(made.distiller.objective, RealImages)
    alignment = made.distiller.objective.alignment
    assert alignment is not None
    term, seen = 0.0, set()
    for (images, labels, classes), weight in run.objective.inputs(0, None)[1]:
        assert len(set(classes.tolist())) == 2
        seen.add(tuple(classes.tolist()))
        synthetic = made.synthetic.of_classes(run.state.outer, classes)
        _, parts = alignment(
            made.network, extractor, (images, labels), synthetic, classes, 3, patches_per_side=4
        )
        term += weight * float(parts["alignment_local"].detach())
    assert len(seen) == 1
    shown = curve(shown_in(folder), "outer/alignment_local")
    assert shown[0] == pytest.approx(term, rel=1e-4)


def test_damaged_caches_are_said_and_made_again(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    kept = {"tiny_imagenet__cache_folder": str(cache), "kip_whitening__cache_folder": str(cache)}
    assert train.main(words(root, tmp_path / "whole", **kept)) == 0
    whitening, train_images = (
        next(cache.rglob(pattern)) for pattern in ("kip-*", "tiny-imagenet-train-*/images.npy")
    )
    for path in (whitening, train_images):
        path.write_bytes(path.read_bytes()[:-1])

    assert train.main(words(root, tmp_path / "again", **kept)) == 0
    warnings = [line for line in caplog.messages if line.startswith("warning: ")]
    # That the test set is small is said too.
    warned = [line for line in warnings if str(tmp_path) in line]
    assert len(warned) == 2
    assert str(train_images) in warned[0]
    assert str(whitening) in warned[1]
    first, second = (
        read_tensors(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "again")
    )
    assert torch.equal(first[0]["outer.images"], second[0]["outer.images"])
    assert first[1]["best_accuracy"] == second[1]["best_accuracy"]


def test_a_run_may_go_on_with_its_cache_elsewhere(root: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", str(tmp_path / "elsewhere")
    assert train.main(words(root, folder, Distiller__outer_steps=1)) == 0
    moved = {"tiny_imagenet__cache_folder": elsewhere, "kip_whitening__cache_folder": elsewhere}
    assert train.main(words(root, folder, Distiller__outer_steps=2, **moved)) == 0


def test_a_missing_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(tmp_path / "nowhere", tmp_path / "run")) == 2
    message = one_error(capsys)
    assert str(tmp_path / "nowhere") in message
    assert "tiny-imagenet-200.zip" in message
    assert not (tmp_path / "run").exists()
