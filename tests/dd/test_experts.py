"""Expert trajectories: written one by one, resumed, checked, and matched by `dd.train`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    GIN,
    INNER_STEPS,
    OUTER_STEPS,
    arguments,
    curve,
    experiment,
    one_error,
    shown_in,
)

from dd import config, experts, train
from dd.data import Standardize
from dd.distillation.loop import Stepped, begin, outer_loop
from dd.evaluation.distilled_set import DistilledSet
from dd.experiment import Experiment
from dd.networks import ConvNet
from dd.objectives.expert_buffer import ExpertBuffer, ExpertWriter, describe
from dd.runtime.files import DamagedFileError, read_tensors
from dd.runtime.precision import allow_tf32
from dd.runtime.stopping import StopRequest

ATT, MTT = "cifar10_att_cpu.gin", "cifar10_mtt_cpu.gin"
COUNT, SNAPSHOTS = 3, 4
TINY_EXPERTS: dict[str, Any] = {
    "Experiment__dataset": "@digits()",
    "ConvNet__width": 4,
    "Experts__count": COUNT,
    "Experts__snapshots": SNAPSHOTS,
    "Experts__steps_between_snapshots": 2,
    "Experts__batch_size": 32,
    "MatchExperts__max_start": 3,
    "MatchExperts__target_after": 2,
    "Distiller__validate_every": 2,
}


def words(experts_in: Path, run_dir: Path | None = None, file: str = ATT, **changes: Any) -> Any:
    """The arguments of a command with tiny experts of digits."""
    tiny = {**TINY_EXPERTS, "Experts__folder": str(experts_in), **changes}
    return arguments(run_dir, file=file, **tiny)


def matching(experts_in: Path) -> Experiment:
    """The experiment of the same."""
    return experiment(file=ATT, **{**TINY_EXPERTS, "Experts__folder": str(experts_in)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished buffer; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("experts") / "buffer"
    assert experts.main(words(folder)) == 0
    return folder


@pytest.fixture
def buffer(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "buffer"))


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def opened(folder: Path) -> ExpertBuffer:
    return ExpertBuffer(folder, index_of(folder)["description"])


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
    write = ExpertWriter.write

    def stop_after_one(self: ExpertWriter, *arguments: Any) -> None:
        write(self, *arguments)
        stop.signal_number = 2

    monkeypatch.setattr(ExpertWriter, "write", stop_after_one)
    made = matching(folder)
    data = made.prepare()
    given = data, made.network, made.key.fold("experts"), made.describe(data)
    settings = made.distiller.objective.experts
    assert settings is not None
    assert settings.train(*given, stop).done == {0}
    before = (folder / "expert_0000.safetensors").stat().st_mtime_ns
    monkeypatch.undo()
    assert settings.train(*given, StopRequest()).done == set(range(COUNT))
    assert (folder / "expert_0000.safetensors").stat().st_mtime_ns == before
    for expert in range(COUNT):
        name = f"expert_{expert:04d}.safetensors"
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def test_bfloat16_halves_the_file_and_the_index_states_its_effect(
    trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "buffer"
    assert experts.main(words(folder, Experts__storage="bfloat16", Experts__count=1)) == 0
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
    assert experts.main(words(buffer, **changes)) == 2
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
    assert train.main(words(trained, folder)) == 0
    return folder


def test_a_run_shows_the_nearest_step_the_rate_and_the_mismatch(distilled: Path) -> None:
    shown = shown_in(distilled)

    def values(name: str) -> list[float]:
        return curve(shown, name)

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


def test_mtt_differentiates_every_step(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train.main(words(trained, folder, MTT, Distiller__outer_steps=2)) == 0
    assert curve(shown_in(folder), "window/stop") == [INNER_STEPS] * 2


def test_without_experts_training_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words(tmp_path / "none", tmp_path / "run")) == 2
    assert "python -m dd.experts" in one_error(capsys)


def test_the_average_follows_the_images(trained: Path) -> None:
    """a ← d·a + (1 − d)·x, from the first images on."""
    made = matching(trained)
    made.distiller.average_decay = 0.7
    run = begin(made.distiller, made.task(made.prepare(), None))
    average = (run.state.average or {})["images"]
    expected = run.state.outer["images"].detach().clone()
    for event in outer_loop(run):
        if isinstance(event, Stepped):
            expected = 0.7 * expected + 0.3 * run.state.outer["images"].detach()
            torch.testing.assert_close(average, expected)
    assert not torch.equal(average, run.state.outer["images"])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Distiller.optimizer = @sgd()", "its rate is learned, so write @sgd"),
        ("MatchExperts.max_start = 50", "a stretch would end at snapshot"),
        ("MatchExperts.momentum = 1.0", "momentum=1.0"),
        ("Distiller.average_decay = 1.0", "average_decay=1.0"),
        ("Experts.storage = 'float16'", "storage='float16'"),
        ("MatchExperts.experts = @Experts", "experts"),
    ],
)
def test_wrong_settings_are_named(binding: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load(
            [str(GIN / ATT)],
            ["Experiment.dataset = @digits()", "sgd.lr = 0.1", binding],
        )


def test_tensorfloat_is_for_matching_too(trained: Path) -> None:
    made = matching(trained)
    made.distiller.tf32 = True
    try:
        begin(made.distiller, made.task(made.prepare(), None))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        allow_tf32(False)
