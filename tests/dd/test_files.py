"""Files of a run: written whole or not at all; a damaged one is refused by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import seeded
from safetensors.torch import save_file
from torch import Tensor

import bilevel
from dd.data import KIPWhitening, Standardize, ZCAWhitening
from dd.distillation.state import TrainingState
from dd.evaluation.distilled_set import DistilledSet
from dd.runtime.files import (
    DamagedFileError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)

FITS = {"standardize": Standardize.fit, "zca": ZCAWhitening.fit, "kip": KIPWhitening.fit}


def distilled_set(kind: str = "standardize", soft: bool = False) -> DistilledSet:
    pixels = torch.rand(20, 1, 3, 3, generator=seeded(0))
    return DistilledSet(
        images=torch.randn(4, 1, 3, 3, generator=seeded(1)),
        labels=torch.rand(4, 2, generator=seeded(2)) if soft else torch.tensor([0, 0, 1, 1]),
        transform=FITS[kind](pixels),
        class_names=("cat", "дог"),
        provenance={"dataset": "tiny", "step": 7, "seconds": 1.5, "note": None},
    )


def training_state(seed: int = 0, steps: int = 3) -> TrainingState:
    """A state in which everything has moved: two variables, momenta, clip and schedule."""
    outer = {
        "images": torch.randn(4, 1, 2, 2, generator=seeded(seed)).requires_grad_(),
        "labels": torch.rand(4, 2, generator=seeded(seed + 1)).requires_grad_(),
    }
    optimizer = torch.optim.Adam([{"params": [value], "lr": 0.1} for value in outer.values()])
    clip = bilevel.clip.MovingAverageClip()
    truncation = bilevel.truncation.RandomWindow(window=2, refresh=5)
    state = TrainingState(outer, optimizer, clip, truncation)
    for step in range(steps):
        advance(state, step)
    return state


def advance(state: TrainingState, step: int) -> None:
    """One step that depends on everything that is saved."""
    horizon = state.truncation.plan(10, seeded(step)).horizon
    for value in state.outer.values():
        value.grad = value.detach() * horizon + torch.randn(value.shape, generator=seeded(step))
    assert state.clip is not None
    state.clip(state.outer.values())
    state.optimizer.step()
    state.step, state.seconds = step + 1, state.seconds + 0.25
    state.best_accuracy, state.best_step, state.processes = 0.5, step, 2


def tensors() -> dict[str, Tensor]:
    return {"a": torch.randn(3, 2, generator=seeded(0)), "b": torch.arange(3)}


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "hello"),
    "json": lambda path: write_json(path, {"mean": 0.25}),
    "tensors": lambda path: write_tensors(path, tensors(), {"step": 1}),
    "distilled set": lambda path: distilled_set().save(path),
    "checkpoint": lambda path: training_state().save(path),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "json": read_json,
    "tensors": read_tensors,
    "distilled set": DistilledSet.load,
    "checkpoint": lambda path: training_state().restore(path),
}
each_writer = pytest.mark.parametrize("kind", WRITERS)
each_reader = pytest.mark.parametrize("kind", READERS)
each_safetensors_reader = pytest.mark.parametrize(
    "kind", [kind for kind in READERS if kind != "json"]
)


# Writing.


@each_writer
@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
    kind: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="no space left"):
        WRITERS[kind](path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@each_writer
def test_writing_makes_the_folder_and_leaves_one_readable_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file"
    WRITERS[kind](path)
    WRITERS[kind](path)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"mean": 0.25})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"mean": float("nan")})
    assert read_json(path) == {"mean": 0.25}


# Round trips.


def test_tensors_and_metadata_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "file"
    metadata = {"none": None, "list": [1, "two"], "float": 0.1}
    write_tensors(path, {"view": torch.arange(6.0).view(2, 3).T, **tensors()}, metadata)
    found, found_metadata = read_tensors(path)
    assert found_metadata == metadata
    assert torch.equal(found["view"], torch.arange(6.0).view(2, 3).T)
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", FITS)
def test_a_distilled_set_round_trips_bit_for_bit(kind: str, soft: bool, tmp_path: Path) -> None:
    saved = distilled_set(kind, soft)
    saved.save(tmp_path / "set")
    loaded = DistilledSet.load(tmp_path / "set")
    assert loaded.images.dtype == torch.float32
    assert loaded.labels.dtype == saved.labels.dtype
    assert torch.equal(loaded.images, saved.images)
    assert torch.equal(loaded.labels, saved.labels)
    assert loaded.class_names == saved.class_names
    assert loaded.provenance == saved.provenance
    assert loaded.transform.kind == saved.transform.kind
    pixels = torch.rand(5, 1, 3, 3, generator=seeded(9))
    assert torch.equal(loaded.transform(pixels), saved.transform(pixels))
    assert torch.equal(loaded.pixels(), saved.pixels())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(steps: int, tmp_path: Path) -> None:
    state = training_state(steps=steps)
    state.save(tmp_path / "checkpoint")
    restored = training_state(seed=50, steps=0)
    restored.restore(tmp_path / "checkpoint")
    for each in (state, restored):
        for step in range(steps, steps + 4):
            advance(each, step)
    for name, value in state.outer.items():
        assert torch.equal(restored.outer[name], value)
    assert restored.clip.state_dict() == state.clip.state_dict()  # type: ignore[union-attr]
    assert restored.truncation.state_dict() == state.truncation.state_dict()
    for name in ("step", "seconds", "best_accuracy", "best_step", "processes"):
        assert getattr(restored, name) == getattr(state, name)


# Reading what is damaged.


def damaged(path: Path, kind: str, content: bytes) -> str:
    """The message with which `content` is refused."""
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        READERS[kind](path)
    assert type(caught.value) is DamagedFileError
    return str(caught.value)


def complaint(path: Path, kind: str) -> str:
    """The message with which a file is refused, or its path where it is not."""
    try:
        READERS[kind](path)
    except DamagedFileError as error:
        return str(error)
    return str(path)


def written(kind: str, path: Path) -> bytes:
    WRITERS[kind](path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "file"


@each_reader
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_a_truncated_file_is_refused_by_name(kind: str, share: float, scratch: Path) -> None:
    content = written(kind, scratch).rstrip(b"\n")
    assert str(scratch) in damaged(scratch, kind, content[: int(share * len(content))])


@each_safetensors_reader
@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_corrupt_header_gives_no_other_error(
    kind: str, share: float, byte: int, scratch: Path
) -> None:
    """Some bytes, such as those of a name in the provenance, nobody can know to be wrong."""
    content = bytearray(written(kind, scratch))
    header = 8 + int.from_bytes(content[:8], "little")
    content[int(share * header)] = byte
    scratch.write_bytes(content)
    assert str(scratch) in complaint(scratch, kind)


@each_reader
@given(content=st.binary(max_size=300))
@example(content=b"\x80\x04\x95")  # a pickle, as torch.save writes
@example(content=(8).to_bytes(8, "little") + b"{}      ")  # safetensors without metadata
def test_a_foreign_file_is_refused_by_name(kind: str, content: bytes, scratch: Path) -> None:
    if kind == "json":
        content = b"{" + content
    assert str(scratch) in damaged(scratch, kind, content)


@each_safetensors_reader
@pytest.mark.parametrize("metadata", [None, {"dd": "[]"}, {"dd": "3"}, {"dd": "?"}])
def test_safetensors_of_others_are_refused_by_name(
    kind: str, metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    save_file({"images": torch.zeros(1, 1, 2, 2)}, path, metadata)
    assert str(path) in damaged(path, kind, path.read_bytes())


@pytest.mark.parametrize("kind", ["distilled set", "checkpoint"])
def test_anything_missing_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    WRITERS[kind](path)
    found, metadata = read_tensors(path)
    accepted = []
    for name in [*found, *metadata]:
        write_tensors(
            path,
            {key: value for key, value in found.items() if key != name},
            {key: value for key, value in metadata.items() if key != name},
        )
        try:
            READERS[kind](path)
        except DamagedFileError as error:
            accepted += [] if str(path) in str(error) else [f"{name}: {error}"]
        else:
            accepted.append(name)
    assert accepted == []


@pytest.mark.parametrize("kind", ["distilled set", "checkpoint"])
@pytest.mark.parametrize("value", [None, 3, "x", [1]], ids=str)
def test_metadata_of_a_wrong_type_gives_no_other_error(
    kind: str, value: object, scratch: Path
) -> None:
    WRITERS[kind](scratch)
    found, metadata = read_tensors(scratch)
    for name in metadata:
        write_tensors(scratch, found, {**metadata, name: value})
        assert str(scratch) in complaint(scratch, kind), name


def test_one_kind_of_file_is_not_taken_for_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert str(path) in damaged(path, "checkpoint", written("distilled set", path))
    assert str(path) in damaged(path, "distilled set", written("checkpoint", path))


def test_images_without_as_many_labels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set"
    distilled_set().save(path)
    found, metadata = read_tensors(path)
    write_tensors(path, {**found, "labels": torch.tensor([0])}, metadata)
    assert "(4, 1, 3, 3)" in damaged(path, "distilled set", path.read_bytes())


def test_a_checkpoint_of_another_configuration_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    training_state().save(path)
    other = training_state()
    other.outer = {"images": torch.zeros(2, 1, 2, 2)}
    with pytest.raises(DamagedFileError, match=r"\(4, 1, 2, 2\).*\(2, 1, 2, 2\)"):
        other.restore(path)


@pytest.mark.parametrize("kind", ["distilled set", "checkpoint", "tensors"])
def test_a_missing_file_is_not_called_damaged(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        READERS[kind](tmp_path / "nowhere")
