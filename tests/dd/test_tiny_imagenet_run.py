"""Distilling a folder of images in patches, as a user runs it: caches, resuming, what is shown."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import write_tiny_imagenet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd import config, evaluate, train
from dd import experts as train_experts
from dd.evaluation.distilled_set import DistilledSet
from dd.runtime.files import read_tensors

GIN = Path(__file__).parents[2] / "gin"
#: 16×16 images of three classes, of which the network makes a map of 4×4, one place for each patch.
TINY = {
    "tiny_imagenet.image_size": 16,
    "Experiment.validation_fraction": 0.25,
    "Experiment.images_on": "host",
    "ConvNet.depth": 2,
    "ConvNet.width": 4,
    "SyntheticDataset.projection": "every_step",
    "PrototypeAlignment.weight": 1.0,
    "Distiller.minutes": None,
    "Distiller.outer_steps": 4,
    "Distiller.inner_steps": 4,
    "Distiller.real_batch": 5,
    "Distiller.real_micro_batch": 3,
    "Distiller.validate_every": 2,
    "Evaluator.validation_steps": 2,
    "RandomWindow.window": 2,
    "Evaluator.networks": 1,
    "Evaluator.steps": [2],
    "Evaluator.full_data_networks": 1,
    "Evaluator.full_data_steps": [2],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_imagenet(tmp_path / "tiny-imagenet-3")


def arguments(
    root: Path, run_dir: Path, file: str = "tiny_imagenet_psp_cpu.gin", **changes: Any
) -> list[str]:
    bindings = {**TINY, "tiny_imagenet.root": str(root)}
    bindings |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [f"--gin_param={name} = {value!r}" for name, value in bindings.items()]
    return [
        f"--gin_file={GIN / file}",
        f"--run_dir={run_dir}",
        *words,
        "--gin_param=Experiment.transform = @kip_whitening",
    ]


@pytest.fixture(autouse=True)
def _no_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (train, evaluate):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: True)


@pytest.mark.parametrize("file", ["tiny_imagenet_psp_cpu.gin", "tiny_imagenet_ipc1.gin"])
def test_a_run_in_patches(root: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "run"
    small = {"StageAware__window": 2, "StageAware__width_range": 1, "StageAware__refresh": 2}
    assert train.main(arguments(root, folder, file, **small)) == 0

    distilled = DistilledSet.load(folder / "distilled.safetensors")
    assert distilled.images.shape == (3, 3, 16, 16)
    assert distilled.class_names == ("n03", "goldfish", "scorpion")
    patches = read_tensors(folder / "checkpoint.safetensors")[0]["outer.images"]
    assert patches.shape == (3 * 16, 3, 4, 4)
    torch.testing.assert_close(patches.flatten(1).norm(dim=1), torch.full((48,), 0.25))

    shown = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0}).Reload()
    values = {
        name: [event.value for event in shown.Scalars(f"outer/{name}")]
        for name in ("loss", "cross_entropy", "alignment_global", "alignment_local")
    }
    assert len(values["loss"]) == 4
    for loss, *parts in zip(*values.values(), strict=True):
        assert loss == pytest.approx(sum(parts), rel=1e-5)  # λ = 1
        assert all(part > 0 for part in parts)
    assert evaluate.main([str(folder), f"--json={tmp_path / 'results.json'}"]) == 0


def test_a_few_classes_aligned_by_the_features_of_an_expert(root: Path, tmp_path: Path) -> None:
    experts = [
        "--gin_param=PrototypeAlignment.experts = @Experts()",
        "--gin_param=PrototypeAlignment.classes_per_step = 2",
        f"--gin_param=Experts.folder = {str(tmp_path / 'experts')!r}",
        "--gin_param=Experts.count = 1",
        "--gin_param=Experts.snapshots = 2",
        "--gin_param=Experts.batch_size = 4",
    ]
    folder = tmp_path / "run"
    command = [*arguments(root, folder), *experts]
    assert train.main(command) == 2
    assert not (folder / "distilled.safetensors").exists()
    without_run_dir = [word for word in command if not word.startswith("--run_dir")]
    assert train_experts.main(without_run_dir) == 0
    assert train.main(command) == 0

    # The last of its two snapshots makes the features, of two classes in every outer step.
    shown = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0}).Reload()
    experiment = config.load(
        [str(GIN / "tiny_imagenet_psp_cpu.gin")],
        [word.removeprefix("--gin_param=") for word in command if "gin_param" in word],
    )
    data = experiment.prepare()
    job = experiment.task(data, tmp_path)
    goal = experiment.distiller.objective.prepare(experiment.distiller, job, job.key)
    snapshot = read_tensors(tmp_path / "experts" / "expert_0000.safetensors")[0]["snapshots"][2]
    assert torch.equal(torch.cat([p.flatten() for p in goal.problem.extractor.values()]), snapshot)
    outer = experiment.distiller._initial_state(job).outer
    term, seen = 0.0, set()
    for (images, labels, classes), weight in goal.inputs(0, None)[1]:
        assert len(set(classes.tolist())) == 2
        seen.add(tuple(classes.tolist()))
        _, parts = experiment.distiller.alignment(
            experiment.network,
            goal.problem.extractor,
            (images, labels),
            experiment.synthetic.of_classes(outer, classes),
            classes,
            3,
            4,
        )
        term += weight * float(parts["alignment_local"].detach())
    assert len(seen) == 1
    assert shown.Scalars("outer/alignment_local")[0].value == pytest.approx(term, rel=1e-4)


def test_a_resumed_run_with_damaged_caches_equals_an_uninterrupted_one(
    root: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    kept = {"tiny_imagenet__cache_folder": str(cache), "kip_whitening__cache_folder": str(cache)}
    assert train.main(arguments(root, tmp_path / "whole", **kept)) == 0
    assert train.main(arguments(root, tmp_path / "run", Distiller__outer_steps=2, **kept)) == 0
    whitening, train_images = (
        next(cache.rglob(pattern)) for pattern in ("kip-*", "tiny-imagenet-train-*/images.npy")
    )
    for path in (whitening, train_images):
        path.write_bytes(path.read_bytes()[:-1])

    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "dd.train",
            *arguments(root, tmp_path / "run", **kept),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming the run" in done.stdout
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2
    assert str(train_images) in warned[0]
    assert str(whitening) in warned[1]
    assert "Traceback" not in done.stderr

    first, second = (
        read_tensors(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "run")
    )
    assert torch.equal(first[0]["outer.images"], second[0]["outer.images"])
    assert first[1]["best_accuracy"] == second[1]["best_accuracy"]


def test_a_run_may_go_on_with_its_cache_elsewhere(root: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", str(tmp_path / "elsewhere")
    assert train.main(arguments(root, folder, Distiller__outer_steps=1)) == 0
    moved = {"tiny_imagenet__cache_folder": elsewhere, "kip_whitening__cache_folder": elsewhere}
    assert train.main(arguments(root, folder, Distiller__outer_steps=2, **moved)) == 0


def test_a_missing_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments(tmp_path / "nowhere", tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert str(tmp_path / "nowhere") in err
    assert "tiny-imagenet-200.zip" in err
    assert not (tmp_path / "run").exists()
