"""Datasets: what is accepted, how it is split, and what the errors say."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dd.data import (
    DatasetNotFoundError,
    ImageDataset,
    arrays,
    cifar10,
    cifar100,
    digits,
    image_folder,
    to_unit_range,
)


def dataset(**changes: Any) -> ImageDataset:
    """Eight training and four test images of two classes, with some fields replaced."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "train_images": torch.zeros(8, 3, 4, 4, dtype=torch.uint8),
        "train_labels": torch.arange(8) % 2,
        "test_images": torch.zeros(4, 3, 4, 4, dtype=torch.uint8),
        "test_labels": torch.arange(4) % 2,
        "class_names": ("cat", "dog"),
    }
    return ImageDataset(**{**fields, **changes})


def test_a_dataset_describes_itself() -> None:
    data = dataset()
    assert data.num_classes == 2
    assert data.image_shape == (3, 4, 4)
    assert "8 training and 4 test images of shape (3, 4, 4)" in repr(data)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]


def test_classes_are_told_with_their_counts() -> None:
    told = dataset().classes_with_counts()
    assert told == "2 classes (training + test images): cat 4 + 2, dog 4 + 2"
    of_two = dataset(train_labels=torch.tensor([0] + 7 * [1])).classes_with_counts(most=1)
    assert of_two == "2 classes of 1 to 7 training and 2 test images"


FLOATS = torch.zeros(8, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ()}, "class_names is empty"),
        ({"class_names": ("a", "\udcff")}, r"the name of the class '\\udcff' is no UTF-8"),
        ({"class_names": ("a", "b", "c")}, r"train_labels has no image of 1 .* classes \(c\)"),
        ({"train_images": torch.zeros(8, 4, 4)}, r"train_images has shape \(8, 4, 4\)"),
        ({"test_images": torch.zeros(0, 3, 4, 4)}, r"test_images has shape \(0, 3, 4, 4\)"),
        ({"train_images": FLOATS.double()}, r"train_images has dtype torch\.float64"),
        ({"train_images": FLOATS + 2}, r"train_images has values from 2\.0 to 2\.0"),
        ({"train_images": FLOATS - 1e-3}, "train_images has values from -0.001"),
        ({"train_images": FLOATS * torch.nan}, "train_images has values from nan"),
        ({"train_images": FLOATS}, r"test_images has dtype torch\.uint8; train_images has"),
        ({"train_labels": torch.zeros(7).long()}, r"train_labels has shape \(7,\).* \(8,\)"),
        ({"test_labels": torch.zeros(4).int()}, r"test_labels has dtype torch\.int32"),
        ({"test_labels": torch.tensor([0, 1, 2, 0])}, r"test_labels has labels from 0 to 2"),
        ({"train_labels": torch.arange(8) - 1}, "train_labels has labels from -1 to 6"),
        (
            {"test_images": torch.zeros(4, 3, 5, 5, dtype=torch.uint8)},
            r"test_images has images of shape \(3, 5, 5\)",
        ),
    ],
)
def test_an_invalid_dataset_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_to_unit_range() -> None:
    result = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(result, torch.tensor([0.0, 0.2, 1.0]))
    assert to_unit_range(torch.ones(2, dtype=torch.float64)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"values from 0\.0 to 255\.0"):
        to_unit_range(torch.tensor([0.0, 255.0]))
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        to_unit_range(torch.tensor([0, 255]))


@given(
    counts=st.lists(st.integers(10, 40), min_size=2, max_size=5),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**31),
)
def test_the_validation_split_is_a_stratified_partition(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    data = dataset(
        train_images=torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8),
        train_labels=labels,
        class_names=tuple(map(str, range(len(counts)))),
    )
    train, validation = data.split_validation(fraction, seed)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(len(labels)))
    held_out = torch.bincount(labels[validation], minlength=len(counts)).double()
    assert (held_out - fraction * torch.tensor(counts)).abs().max() < 2
    again = data.split_validation(fraction, seed)
    assert torch.equal(train, again[0])
    assert torch.equal(validation, again[1])


def test_the_seed_changes_the_validation_split() -> None:
    data = dataset()
    splits = {tuple(data.split_validation(0.5, seed)[1].tolist()) for seed in range(8)}
    assert len(splits) > 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction=.* in \(0, 1\)"):
        dataset().split_validation(fraction, 0)


def test_a_split_that_cannot_be_stratified_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fraction = 0\.1 cannot split 8 images of 2 classes"):
        dataset().split_validation(0.1, 0)


def test_digits() -> None:
    data = digits()
    assert data.image_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.train_images.max() == 1.0
    assert torch.equal(digits(seed=0).test_images, data.test_images)
    assert not torch.equal(digits(seed=1).test_images, data.test_images)
    with pytest.raises(ValueError, match=r"test_fraction=1\.5"):
        digits(test_fraction=1.5)


# --- CIFAR -----------------------------------------------------------------------------------


class FakeCIFAR:
    """torchvision's interface, over files that exist only after a download."""

    url = "https://example.org/cifar.tar.gz"
    present = False
    network = True
    downloads = 0

    def __init__(self, root: str, train: bool, download: bool) -> None:
        cls = type(self)
        if download and not cls.network:
            raise OSError("<urlopen error no route to host>")
        if download:
            cls.present = True
            cls.downloads += 1
        if not cls.present:
            raise RuntimeError("Dataset not found or corrupted.")
        count = 6 if train else 4
        self.data = np.zeros((count, 5, 7, 3), dtype=np.uint8)
        self.data[..., 2] = 9
        self.targets = [index % 2 for index in range(count)]
        self.classes = ["cat", "dog"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCIFAR]:
    source = type("Fake", (FakeCIFAR,), {})
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", source)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", source)
    return source


def test_cifar_is_read_channels_first(fake: type[FakeCIFAR]) -> None:
    fake.present = True
    data = cifar10()
    assert data.image_shape == (3, 5, 7)
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.is_contiguous()
    assert data.train_images.amax((0, 2, 3)).tolist() == [0, 0, 9]
    assert (len(data.train_labels), len(data.test_labels)) == (6, 4)
    assert data.class_names == ("cat", "dog")
    assert fake.downloads == 0


def test_cifar_is_downloaded_only_if_missing(fake: type[FakeCIFAR]) -> None:
    assert cifar100().name == "cifar100"
    cifar100()
    assert fake.downloads == 1


def test_cifar_says_how_to_help_when_the_download_fails(
    fake: type[FakeCIFAR], tmp_path: Path
) -> None:
    fake.network = False
    with pytest.raises(DatasetNotFoundError) as raised:
        cifar10(tmp_path)
    message = str(raised.value)
    assert str(tmp_path) in message
    assert "no route to host" in message
    assert fake.url in message


@pytest.mark.parametrize(
    ("source", "folder"), [(cifar10, "cifar-10-batches-py"), (cifar100, "cifar-100-python")]
)
def test_missing_cifar_without_download(
    source: Callable[..., ImageDataset],
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/data for .*{folder}/.*download=True"):
        source(download=False)


# --- .npz files ------------------------------------------------------------------------------


def write_npz(path: Path, **content: Any) -> Path:
    base: dict[str, Any] = {
        "images": np.zeros((20, 8, 8, 3), dtype=np.uint8),
        "labels": np.arange(20) % 2,
    }
    merged = {key: value for key, value in (base | content).items() if value is not None}
    np.savez(path, **merged)
    return path


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 8, 9), (1, 8, 9)),
        ((20, 8, 9, 3), (3, 8, 9)),
        ((20, 8, 9, 1), (1, 8, 9)),
        ((20, 3, 8, 9), (3, 8, 9)),
        ((20, 1, 8, 9), (1, 8, 9)),
    ],
)
def test_arrays_finds_the_channels(
    shape: tuple[int, ...], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write_npz(
        tmp_path / "mine.npz",
        images=images,
        test_images=images[:4],
        test_labels=np.array([0, 1, 0, 1], dtype=np.uint8),
        class_names=np.array(["cat", "dog"]),
    )
    data = arrays(path)
    assert data.name == "mine"
    assert data.image_shape == expected
    assert data.class_names == ("cat", "dog")
    first = images[0].transpose(2, 0, 1) if shape[-1] in (1, 3) else images[0].reshape(expected)
    assert np.array_equal(data.train_images[0].numpy(), first)
    assert torch.equal(data.test_images, data.train_images[:4])


def test_arrays_splits_off_a_test_set(tmp_path: Path) -> None:
    images = np.linspace(0, 1, 20)[:, None, None].repeat(8, 1).repeat(8, 2)
    path = write_npz(tmp_path / "mine.npz", images=images)
    data = arrays(path, test_fraction=0.3, seed=1)
    assert data.train_images.dtype == torch.float32
    assert (len(data.train_labels), len(data.test_labels)) == (14, 6)
    assert torch.bincount(data.test_labels).tolist() == [3, 3]
    assert data.class_names == ("0", "1")
    seen = torch.cat([data.train_images, data.test_images])[:, 0, 0, 0].sort().values
    torch.testing.assert_close(seen, torch.linspace(0, 1, 20))
    assert torch.equal(arrays(path, 0.3, 1).test_images, data.test_images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": None}, "'images' is missing"),
        ({"labels": None}, "'labels' is missing"),
        ({"test_images": np.zeros((2, 8, 8, 3), np.uint8)}, "'test_labels' is missing"),
        ({"test_labels": np.zeros(2, np.int64)}, "'test_images' is missing"),
        ({"images": np.zeros((20, 3, 8, 3), np.uint8)}, "but both have such a size"),
        ({"images": np.zeros((20, 8, 8, 5), np.uint8)}, "but neither has such a size"),
        ({"images": np.zeros((20, 64), np.uint8)}, r"images has shape \(20, 64\); allowed"),
        ({"images": np.zeros((20, 8, 8), np.int64)}, "images has dtype int64 .* up to 0; say"),
        ({"images": np.full((20, 8, 8), 70000)}, "images has dtype int64 .* up to 70000; say"),
        ({"images": np.full((20, 8, 8), "a")}, "images has dtype <U1; allowed"),
        ({"images": np.full((20, 8, 8), 255.0)}, r"images has values from 255.0 .*white = 255\)"),
        ({"images": np.full((20, 8, 8), np.nan)}, r"images has values from nan to nan; .* 1\]$"),
        ({"images": np.full((20, 8, 8), np.inf)}, "images has values from inf to inf"),
        ({"images": np.full((20, 8, 8), -1)}, "images has dtype int64 .* up to -1"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0)}, "labels has dtype"),
        ({"labels": np.arange(20) % 2 + 0.5}, "labels has .* no whole numbers"),
        ({"labels": np.full(20, np.nan)}, "labels has .* no whole numbers"),
        ({"labels": np.arange(20) % 2 - 1}, "labels from -1 to 0"),
        ({"labels": np.full((20, 2), 0.5)}, "labels has .* not a single 1 in every row"),
        ({"labels": np.eye(3)[np.arange(20) % 2]}, "no image of 1 of the 3 classes"),
        ({"labels": np.zeros((20, 2, 2))}, "labels has .* whole numbers or strings"),
        ({"train_images": np.zeros((20, 8, 8, 3), np.uint8)}, "both 'images' and 'train_images'"),
        ({"Images": np.zeros((20, 8, 8, 3), np.uint8)}, "both 'images' and 'Images'"),
        ({"val_images": np.zeros((2, 8, 8, 3), np.uint8)}, "'val_labels' is missing"),
        (
            {"test_images": np.zeros((2, 8, 8, 3)), "test_labels": np.array(["a", "b"])},
            "test_labels has the class 'a', which is none",
        ),
        ({"labels": np.zeros(19, np.int64)}, r"labels has shape \(19,\); for 20 images"),
        ({"labels": np.arange(20) % 2 * 10**12}, "labels goes up to 1000000000000"),
        ({"labels": np.arange(20) % 2 * 2}, "no image of 1 of the 3 classes"),
        ({"class_names": np.array([1, 2])}, "class_names has dtype int64"),
        ({"class_names": np.array(["a"])}, "labels from 0 to 1; with 1 class_names"),
        ({"images": np.array([None] * 20)}, "object arrays and pickles are refused"),
    ],
)
def test_an_npz_that_makes_no_dataset_is_refused(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_npz(tmp_path / "mine.npz", **content)
    with pytest.raises(ValueError, match=rf"mine\.npz.*{message}"):
        arrays(path)


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(20) % 2


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ({}, {}),
        ({"labels": LABELS[:, None]}, {}),
        ({"labels": LABELS > 0}, {}),
        ({"labels": LABELS.astype(np.float32)}, {}),
        ({"labels": LABELS.astype(np.uint64)}, {}),
        ({"labels": np.eye(2)[LABELS]}, {}),
        ({"labels": np.eye(2, dtype=bool)[LABELS]}, {}),
        ({"labels": np.array(["cat", "dog"])[LABELS]}, {}),
        ({"labels": np.array([b"cat", b"dog"])[LABELS]}, {}),
        ({"images": PIXELS.transpose(0, 3, 1, 2)}, {}),
        ({"images": PIXELS.astype(np.int64)}, {}),
        ({"images": PIXELS.astype(np.uint16) * 257}, {}),
        ({"images": PIXELS.astype(np.uint16) * 257}, {"white": 65535}),
        ({"images": PIXELS.astype(np.int16) * 16 + 15}, {}),
        ({"images": PIXELS / 255}, {}),
        ({"images": (PIXELS / 255).astype(np.float32)}, {}),
        ({"images": PIXELS.astype(np.float64)}, {"white": 255}),
        ({"images": PIXELS, "names": np.array([None])}, {}),
        ({"images": PIXELS, "labels": LABELS}, {"white": 255, "channels": "last"}),
    ],
)
def test_arrays_takes_the_forms_that_people_have(
    content: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    path = write_npz(tmp_path / "mine.npz", **{"images": PIXELS, "labels": LABELS} | content)
    plain = arrays(write_npz(tmp_path / "plain.npz", images=PIXELS, labels=LABELS))
    data = arrays(path, **options)
    expected = to_unit_range(plain.train_images)
    torch.testing.assert_close(to_unit_range(data.train_images), expected, rtol=0, atol=1e-6)
    assert torch.equal(data.train_labels, plain.train_labels)
    assert torch.equal(data.test_labels, plain.test_labels)
    named = content.get("labels", LABELS).dtype.kind in "SU"
    assert data.class_names == (("cat", "dog") if named else ("0", "1"))


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test"),
        ("X_train", "y_train", "X_val", "y_val", "X_test", "y_test"),
        ("images", "labels", "validation_images", "validation_labels", "test_x", "test_y"),
        ("X", "y", "val_x", "val_y", "test_images", "test_labels"),
    ],
)
def test_arrays_knows_the_names_that_people_give(names: tuple[str, ...], tmp_path: Path) -> None:
    parts = (PIXELS[:12], LABELS[:12], PIXELS[12:16], LABELS[12:16], PIXELS[16:], LABELS[16:])
    content = {"images": None, "labels": None} | dict(zip(names, parts, strict=True))
    data = arrays(write_npz(tmp_path / "mine.npz", **content))
    train, validation = data.split_validation(0.1, seed=0)
    assert (train.tolist(), validation.tolist()) == (list(range(12)), list(range(12, 16)))
    everything = torch.cat([data.train_images, data.test_images])
    assert np.array_equal(everything.permute(0, 2, 3, 1).numpy(), PIXELS)
    assert torch.cat([data.train_labels, data.test_labels]).tolist() == LABELS.tolist()


@pytest.mark.parametrize("last", [True, False])
def test_the_fourth_channel_of_an_array_is_opacity(
    last: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opacity = np.zeros((20, 8, 8, 1), np.uint8)
    opacity[:, 4:] = 255
    images = np.concatenate([PIXELS, opacity], axis=3)
    form = images if last else images.transpose(0, 3, 1, 2)
    data = arrays(write_npz(tmp_path / "mine.npz", images=form), test_fraction=0.5)
    shown = torch.cat([data.train_images, data.test_images])
    assert shown.shape[1:] == (3, 8, 8)
    assert bool((shown[:, :, :4] == 255).all())
    below = {image.numpy().tobytes() for image in shown[:, :, 4:].permute(0, 2, 3, 1).contiguous()}
    assert below == {image.tobytes() for image in np.ascontiguousarray(PIXELS[:, 4:])}
    assert "fourth channel of images is taken for opacity" in caplog.text
    write_npz(tmp_path / "mine.npz", images=form / 255)
    floats = arrays(tmp_path / "mine.npz", test_fraction=0.5)
    torch.testing.assert_close(floats.train_images, to_unit_range(data.train_images))


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0, 0, 1], 0.5, "every class needs two, and class dog has one"),
        ([0, 0, 1, 1], 0.1, "would hold out 1, and every class needs one; use a larger fraction"),
        ([0, 0, 1, 1], 0.7, "would keep 1, and every class needs one; use a smaller fraction"),
        ([0] * 30 + [1] * 2, 0.9, "leaves no image of class dog to train on"),
    ],
)
def test_a_split_that_is_impossible_is_said_by_name(
    labels: list[int], fraction: float, message: str, tmp_path: Path
) -> None:
    content = {"images": np.zeros((len(labels), 8, 8), np.uint8), "labels": np.array(labels)}
    path = write_npz(tmp_path / "mine.npz", class_names=np.array(["cat", "dog"]), **content)
    with pytest.raises(ValueError, match=message):
        arrays(path, fraction)


def test_a_test_set_that_says_little_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    dataset(test_labels=torch.zeros(4).long())
    assert "the test set of tiny has 4 images, so each counts for 25.0 %" in caplog.text
    assert "the test set of tiny has no image of 1 of the 2 classes (dog)" in caplog.text
    assert "8 of 8 images of tiny that were looked at are of one colour" in caplog.text


def test_arrays_is_told_where_the_channels_are(tmp_path: Path) -> None:
    images = PIXELS[:, :3]
    path = write_npz(tmp_path / "mine.npz", images=images)
    assert arrays(path, channels="last").image_shape == (3, 3, 8)
    assert arrays(path, channels="first").image_shape == (3, 8, 3)


def damaged_files() -> dict[str, bytes]:
    archive, single = io.BytesIO(), io.BytesIO()
    np.savez_compressed(archive, images=np.eye(400, dtype=np.uint8), labels=np.arange(400))
    np.save(single, np.zeros(3))
    whole = archive.getvalue()
    middle = len(whole) // 2
    return {
        "empty": b"",
        "text": b"not an archive",
        "pickle": b"\x80\x04N.",
        "single array": single.getvalue(),
        "truncated": whole[:middle],
        "overwritten": whole[:200] + bytes(100) + whole[300:],
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_a_damaged_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(ValueError, match=r"mine\.npz cannot be read as an \.npz file"):
        arrays(path)


def test_a_missing_npz(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=f"{tmp_path} for the file absent.npz"):
        arrays(tmp_path / "absent.npz")


# --- image folders ---------------------------------------------------------------------------


def write_images(directory: Path, count: int, size: tuple[int, int] = (12, 8)) -> None:
    directory.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, (10 * index, 0, 200)).save(directory / f"{index}.png")


def test_image_folder_with_train_and_test(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, count)
    Image.new("L", (30, 20), 77).save(tmp_path / "train" / "dog" / "9.png")
    data = image_folder(tmp_path, image_size=4)
    assert data.name == tmp_path.name
    assert data.class_names == ("cat", "dog")
    assert data.image_shape == (3, 4, 4)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images[1, :, 0, 0].tolist() == [10, 0, 200]
    assert (data.train_images[-1] == 77).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_grey_keep_their_upper_eight(suffix: str, tmp_path: Path) -> None:
    grey = (256 * np.arange(64, dtype=np.uint16) + 200).reshape(8, 8)
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 1)
        write_images(tmp_path / "test" / name, 1)
    Image.fromarray(grey).save(tmp_path / "train" / "cat" / f"a.{suffix}")
    data = image_folder(tmp_path, image_size=8)
    assert torch.equal(data.train_images[1], torch.arange(64).view(1, 8, 8).expand(3, 8, 8).byte())


@pytest.mark.parametrize("pixels", [np.float32(0.5), np.int32(-3), np.int32(2**16)])
def test_pixels_wider_than_sixteen_bits_are_refused(pixels: Any, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
    Image.fromarray(np.full((8, 8), pixels)).save(tmp_path / "cat" / "a.tif")
    with pytest.raises(ValueError, match=r"cat/a\.tif: its pixels are neither of 8 nor of 16 bits"):
        image_folder(tmp_path, image_size=8, test_fraction=0.5)


def test_image_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    # Red outside, green in the middle third: the centre crop of a 3:1 image is all green.
    picture = np.zeros((8, 24, 3), dtype=np.uint8)
    picture[..., 0] = 255
    picture[:, 8:16] = (0, 255, 0)
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
        Image.fromarray(picture).save(tmp_path / name / "a.png")
    data = image_folder(tmp_path, image_size=8, test_fraction=0.5)
    images = torch.cat([data.train_images, data.test_images])
    green = (images == torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]).all(1)
    assert green.flatten(1).all(1).sum() == 2


def test_image_folder_splits_off_a_test_set(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 5)
    data = image_folder(tmp_path, image_size=4, test_fraction=0.4)
    assert (len(data.train_labels), len(data.test_labels)) == (6, 4)
    assert torch.bincount(data.test_labels).tolist() == [2, 2]
    reds = torch.cat([data.train_images, data.test_images])[:, 0, 0, 0]
    assert sorted(reds.tolist()) == sorted(2 * [0, 10, 20, 30, 40])


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_is_named(content: bytes, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 5)
    (tmp_path / "dog" / "damaged.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot decode the image {tmp_path}/dog/damaged.png"):
        image_folder(tmp_path, image_size=4, test_fraction=0.4)


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=f"{tmp_path}/absent for train/<class>/"):
        image_folder(tmp_path / "absent", image_size=4)
    with pytest.raises(ValueError, match=r"image_size=0: it must be an integer in \[1, "):
        image_folder(tmp_path, image_size=0)
    write_images(tmp_path / "train" / "cat", 2)
    with pytest.raises(DatasetNotFoundError, match="for test/ beside train/; add it, or pass"):
        image_folder(tmp_path, image_size=4)
    write_images(tmp_path / "test" / "dog", 2)
    with pytest.raises(ValueError, match="same classes; only one of them has 'cat'"):
        image_folder(tmp_path, image_size=4)
    (tmp_path / "test" / "cat").mkdir()
    with pytest.raises(DatasetNotFoundError, match="no valid file for the classes cat"):
        image_folder(tmp_path, image_size=4)
