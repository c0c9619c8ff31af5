"""Expert trajectories: written one by one, resumed, checked, and matched by `dd.train`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bilevel
from dd import config, evaluate, experts, train
from dd.data import Standardize
from dd.distillation.state import TrainingState
from dd.evaluation.distilled_set import DistilledSet
from dd.experiment import Experiment
from dd.networks import ConvNet
from dd.objectives.expert_buffer import ExpertBuffer, describe
from dd.runtime.files import DamagedFileError, read_tensors
from dd.runtime.stopping import StopRequest

GIN = Path(__file__).parents[2] / "gin"
COUNT, SNAPSHOTS, INNER_STEPS, OUTER_STEPS = 3, 4, 5, 3
TINY = {
    "Experts.count": COUNT,
    "Experts.snapshots": SNAPSHOTS,
    "Experts.steps_between_snapshots": 2,
    "Experts.batch_size": 32,
    "ConvNet.width": 4,
    "ConvNet.depth": 1,
    "MatchExperts.max_start": 3,
    "MatchExperts.target_after": 2,
    "Distiller.outer_steps": OUTER_STEPS,
    "Distiller.inner_steps": INNER_STEPS,
    "Distiller.validate_every": 2,
    "Evaluator.networks": 2,
    "Evaluator.steps": [3],
    "Evaluator.validation_steps": 3,
}
Run = Callable[..., int]


def arguments(folder: Path, file: str = "cifar10_att_cpu.gin", **changes: Any) -> list[str]:
    """The arguments of tiny experts of digits; in `changes`, `__` stands for a dot."""
    bindings = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    words = [f"--gin_param={name} = {value!r}" for name, value in bindings.items()]
    return [
        f"--gin_file={GIN / file}",
        "--gin_param=Experiment.dataset = @digits()",
        f"--gin_param=Experts.folder = {str(folder)!r}",
        *words,
    ]


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (train, evaluate, experts):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished buffer; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("experts") / "buffer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "keep_freed_memory", lambda: True)
        assert experts.main(arguments(folder)) == 0
    return folder


@pytest.fixture
def buffer(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "buffer"))


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def opened(folder: Path) -> ExpertBuffer:
    return ExpertBuffer(folder, index_of(folder)["description"])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


# Training.


def test_the_index_says_what_the_experts_are(trained: Path) -> None:
    index = index_of(trained)
    assert index["description"]["dataset"] == "digits"
    assert "Conv2d(1, 4" in index["description"]["network"]
    assert index["description"]["transform"] == "zca"
    assert index["training"]["augmentation"].startswith("DSA(")
    assert index["training"]["steps_between_snapshots"] == 2
    assert index["snapshots"] == SNAPSHOTS
    assert [shard["expert"] for shard in index["shards"]] == list(range(COUNT))
    for shard in index["shards"]:
        assert len(shard["sha256"]) == 64
        assert 0 <= shard["validation_accuracy"] <= 1
        assert shard["storage_error"] == 0
        assert shard["stored_validation_accuracy"] == shard["validation_accuracy"]


def test_snapshots_are_points_of_a_training_run(trained: Path) -> None:
    """Every expert starts anew, moves on at every snapshot, and each is one of its own."""
    found = opened(trained)
    assert len(found) == COUNT
    size = sum(torch.Size(shape).numel() for shape in found_shapes(trained))
    seen = [found.snapshot(expert, t) for expert in range(COUNT) for t in range(SNAPSHOTS + 1)]
    assert all(snapshot.shape == (size,) for snapshot in seen)
    assert all(snapshot.dtype == torch.float32 for snapshot in seen)
    assert len({tuple(snapshot.tolist()) for snapshot in seen}) == len(seen)
    step = (found.snapshot(0, 1) - found.snapshot(0, 0)).norm()
    between = (found.snapshot(0, 0) - found.snapshot(1, 0)).norm()
    assert float(step) < 0.5 * float(between)


def found_shapes(folder: Path) -> list[list[int]]:
    return list(index_of(folder)["description"]["parameters"].values())


def test_stopped_halfway_and_run_again_gives_the_bits_of_one_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stop = tmp_path / "buffer", StopRequest()
    write = experts.ExpertWriter.write

    def stop_after_one(self: Any, *words: Any) -> None:
        write(self, *words)
        stop.signal_number = 2

    monkeypatch.setattr(experts.ExpertWriter, "write", stop_after_one)
    experiment = config.load(*split(arguments(folder)))
    data = experiment.prepare()
    job = data, experiment.network, experiment.key.fold("experts"), experiment.describe(data)
    settings: Any = experiment.distiller.objective
    writer = settings.experts.train(*job, stop)
    assert writer.done == {0}
    before = (folder / "expert_0000.safetensors").stat().st_mtime_ns
    monkeypatch.undo()
    assert settings.experts.train(*job, StopRequest()).done == set(range(COUNT))
    assert (folder / "expert_0000.safetensors").stat().st_mtime_ns == before
    for expert in range(COUNT):
        name = f"expert_{expert:04d}.safetensors"
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def split(words: list[str]) -> tuple[list[str], list[str]]:
    files = [word.split("=", 1)[1] for word in words if word.startswith("--gin_file")]
    return files, [word.split("=", 1)[1] for word in words if word.startswith("--gin_param")]


def test_bfloat16_halves_the_file_and_the_index_states_its_effect(
    trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "buffer"
    assert experts.main(arguments(folder, Experts__storage="bfloat16", Experts__count=1)) == 0
    name = "expert_0000.safetensors"
    stored = read_tensors(folder / name)[0]["snapshots"]
    exact = read_tensors(trained / name)[0]["snapshots"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, exact.bfloat16())
    moved = (exact[1:] - exact[:-1]).square().sum(1).mean().sqrt()
    error = (exact - stored.float()).square().sum(1).mean().sqrt() / moved
    (shard,) = index_of(folder)["shards"]
    assert shard["storage_error"] == pytest.approx(float(error), rel=1e-4)
    assert opened(folder).snapshot(0, 1).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"Experts__lr": 0.5}, "lr"),
        ({"Experts__snapshots": 9}, "snapshots"),
        ({"ConvNet__width": 5}, "network"),
        ({"Experiment__seed": 1}, "seed"),
    ],
)
def test_other_experts_are_not_mixed_in(
    changes: dict[str, Any], name: str, buffer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = index_of(buffer)
    assert experts.main(arguments(buffer, **changes)) == 2
    message = one_error(capsys)
    assert f"have {name} " in message
    assert str(buffer) in message
    assert index_of(buffer) == before


def test_without_an_objective_that_matches_experts_there_is_nothing_to_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert experts.main([f"--gin_file={GIN / 'digits.gin'}"]) == 2
    assert "MatchExperts" in one_error(capsys)


# Reading.


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "foreign", "network"])
def test_a_wrong_shard_is_named(damage: str, buffer: Path) -> None:
    path = buffer / "expert_0001.safetensors"
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[:-7])
    elif damage == "flipped":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"PK\3\4 a zip")
    else:
        path.write_bytes(good.replace(b"Conv2d(1, 4", b"Conv2d(1, 5"))
    with pytest.raises(DamagedFileError, match="expert_0001"):
        opened(buffer).snapshot(1, 0)


def test_experts_behind_another_whitening_are_refused(trained: Path) -> None:
    wanted = dict(index_of(trained)["description"])
    seen = wanted["transform_of_a_fixed_image"]
    wanted["transform_of_a_fixed_image"] = [1.1 * value for value in seen]
    with pytest.raises(DamagedFileError, match="another fitted zca transform"):
        ExpertBuffer(trained, wanted)
    wanted["transform_of_a_fixed_image"] = [value * (1 + 1e-5) for value in seen]
    ExpertBuffer(trained, wanted)


def test_a_description_notices_a_change_of_the_transform() -> None:
    def described(std: float) -> dict[str, Any]:
        network = ConvNet(3, 1, image_size=4, depth=1, width=2)
        return describe(network, Standardize([0.5], [std]), "mine", (1, 4, 4), 0, 0.1)

    assert described(1.0) == described(1.0)
    assert described(1.0) != described(1.1)


def test_stretches_start_and_end_where_they_may(trained: Path) -> None:
    found = opened(trained)
    points = {
        tuple(found.snapshot(expert, t).tolist()): (expert, t)
        for expert in range(COUNT)
        for t in range(SNAPSHOTS + 1)
    }
    drawn = set()
    for seed in range(100):
        start, target = found.stretch(torch.Generator().manual_seed(seed), 3, 2)
        (first, begin), (last, end) = points[tuple(start.tolist())], points[tuple(target.tolist())]
        assert first == last
        assert end == begin + 2
        drawn.add((first, begin))
    assert drawn == {(expert, begin) for expert in range(COUNT) for begin in range(3)}


# Distilling.


@pytest.fixture(scope="module")
def distilled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("att") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "keep_freed_memory", lambda: True)
        assert train.main([*arguments(trained), f"--run_dir={folder}"]) == 0
    return folder


def test_a_run_shows_the_nearest_step_the_rate_and_the_mismatch(distilled: Path) -> None:
    shown = EventAccumulator(str(distilled / "events"), size_guidance={"scalars": 0}).Reload()

    def values(name: str) -> list[float]:
        return [event.value for event in shown.Scalars(name)]

    nearest = values("matching/nearest_step")
    assert len(nearest) == OUTER_STEPS
    assert nearest == values("window/stop")
    assert all(1 <= step <= INNER_STEPS for step in nearest)
    excess = values("matching/excess_at_fixed_length")
    mismatched = [value > 0.05 for value in excess]
    expected = [sum(mismatched[: n + 1]) / (n + 1) for n in range(OUTER_STEPS)]
    assert values("matching/fraction_mismatched") == pytest.approx(expected)
    assert all(value > 0 for value in values("outer/rate"))
    assert values("validation/accuracy_of_average")


def test_the_set_carries_its_learned_rate_and_the_average_is_kept(distilled: Path) -> None:
    found = DistilledSet.load(distilled / "distilled.safetensors")
    assert found.provenance["learning_rate"] > 0
    average = DistilledSet.load(distilled / "snapshots" / "average.safetensors")
    assert average.images.shape == found.images.shape


def test_a_resumed_run_equals_an_uninterrupted_one(
    trained: Path, distilled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for steps in (1, OUTER_STEPS):
        words = arguments(trained, Distiller__outer_steps=steps)
        assert train.main([*words, f"--run_dir={folder}"]) == 0
    whole, resumed = (
        read_tensors(run / "checkpoint.safetensors")[0] for run in (distilled, folder)
    )
    assert {"outer.images", "outer.rate", "average", "optimizer.0.momentum_buffer"} <= set(whole)
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_mtt_differentiates_every_step(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = arguments(trained, "cifar10_mtt_cpu.gin", Distiller__outer_steps=2)
    assert train.main([*words, f"--run_dir={folder}"]) == 0
    shown = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0}).Reload()
    assert [event.value for event in shown.Scalars("window/stop")] == [INNER_STEPS] * 2


def test_without_experts_training_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*arguments(tmp_path / "none"), f"--run_dir={tmp_path / 'run'}"]
    assert train.main(words) == 2
    assert "python -m dd.experts" in one_error(capsys)


def test_the_average_follows_the_images(tmp_path: Path, trained: Path) -> None:
    """a ← d·a + (1 − d)·x, from the first images on."""
    images: list[torch.Tensor] = []
    save = TrainingState.save

    def noted(self: TrainingState, path: Path) -> None:
        images.append(self.outer["images"].detach().clone())
        save(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "save", noted)
        for steps in (1, 2):
            words = arguments(trained, Distiller__outer_steps=steps, Distiller__average_decay=0.7)
            assert train.main([*words, f"--run_dir={tmp_path / 'run'}"]) == 0
    experiment = config.load(*split(arguments(trained)))
    start = first_images(experiment)
    # The first is saved before the first step.
    torch.testing.assert_close(images[0], start)
    average = 0.7 * (0.7 * start + 0.3 * images[1]) + 0.3 * images[2]
    found = read_tensors(tmp_path / "run" / "checkpoint.safetensors")[0]["average"]
    torch.testing.assert_close(found, average)


def first_images(experiment: Experiment) -> torch.Tensor:
    data = experiment.prepare()
    generator = bilevel.Key(experiment.seed).generator("synthetic")
    outer = experiment.synthetic.create(
        data.train_images, data.train_labels, data.num_classes, generator
    )
    return outer["images"].detach()


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Distiller.optimizer = @sgd()", "its rate is learned, so write @sgd"),
        ("MatchExperts.max_start = 50", "a stretch would end at snapshot"),
        ("MatchExperts.momentum = 1.0", "momentum=1.0"),
        ("Distiller.average_decay = 1.0", "average_decay=1.0"),
        ("Experts.storage = 'float16'", "storage='float16'"),
        ("MatchExperts.experts = @Experts", "experts"),
        ("Distiller.alignment = @PrototypeAlignment()", "alignment: MatchExperts makes no use"),
    ],
)
def test_wrong_settings_are_named(binding: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load(
            [str(GIN / "cifar10_att_cpu.gin")],
            ["Experiment.dataset = @digits()", "sgd.lr = 0.1", binding],
        )


def test_of_a_precision_matching_takes_tf32_alone() -> None:
    base = ["Experiment.dataset = @digits()", "Distiller.precision = @Precision()"]
    files = [str(GIN / "cifar10_att_cpu.gin")]
    assert config.load(files, [*base, "Precision.tf32 = True"]).distiller.precision.tf32
    with pytest.raises(config.ConfigError, match="precision: MatchExperts makes no use of it"):
        config.load(files, [*base, "Precision.inner = 'bfloat16'"])
