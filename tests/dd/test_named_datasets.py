"""Datasets that torchvision and `datasets` know by name, from copies that are made here."""

import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torchvision as library
from PIL import Image

from dd import config
from dd.data import DatasetNotFoundError, hugging_face, torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST: big-endian sizes, then bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> np.ndarray:
    """FashionMNIST's and EMNIST's files, of forty and twenty images; the labels are 1 and 2."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    for raw, prefix in (("FashionMNIST", ""), ("EMNIST", "emnist-letters-")):
        for part, count in (("train", 40), ("t10k" if not prefix else "test", 20)):
            folder = tmp_path / raw / "raw"
            write_idx(folder / f"{prefix}{part}-images-idx3-ubyte", images[:count])
            write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte", 1 + np.arange(count) % 2)
    return images


def test_a_dataset_of_torchvision_is_read_by_its_name(mnist: np.ndarray, tmp_path: Path) -> None:
    for name in ("FashionMNIST", "fashionmnist"):
        data = torchvision(name, tmp_path, download=False)
        assert data.name == "fashionmnist"
        assert data.class_names == ("Trouser", "Pullover")
        assert np.array_equal(data.train_images[:, 0].numpy(), mnist)
        assert data.test_labels.tolist() == [0, 1] * 10


def test_what_else_a_dataset_needs_is_its_variant(mnist: np.ndarray, tmp_path: Path) -> None:
    data = torchvision("EMNIST", tmp_path, download=False, variant="letters")
    assert data.class_names == ("a", "b")
    assert len(data.train_labels) == 40
    with pytest.raises(ValueError, match=r"needs a value for split; say torchvision\.variant"):
        torchvision("EMNIST", tmp_path)


class Splits(library.datasets.VisionDataset):
    """torchvision's interface, with any splits; pictures of two sizes."""

    there: tuple[str, ...] = ("train", "test", "val")
    labels: Any = (0, 1)

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split not in self.there:
            raise ValueError(f"Unknown value {split!r} for argument split")
        if not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.split = split

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        size = (6, 4) if index % 2 else (4, 4)
        brightness = {"train": 0, "trainval": 0, "test": 100, "val": 200}[self.split]
        return Image.new("L", size, brightness), self.labels[index % 2]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        "SVHN": type("SVHN", (Splits,), {}),
        "Imagenette": type("Imagenette", (Splits,), {"there": ("train", "val")}),
        "OxfordIIITPet": type("OxfordIIITPet", (Splits,), {"there": ("trainval", "test")}),
        "CelebA": type("CelebA", (Splits,), {"labels": ([0, 1], [1, 1])}),
        "STL10": type("STL10", (Splits,), {"there": ("unlabeled",)}),
    }
    for name, kind in kinds.items():
        monkeypatch.setattr(library.datasets, name, kind)


@pytest.mark.parametrize(
    ("name", "validation", "test"),
    [("SVHN", 200, 100), ("Imagenette", None, 200), ("OxfordIIITPet", None, 100)],
)
def test_splits_are_used_as_they_are_called(
    name: str, validation: int | None, test: int, toys: None, tmp_path: Path
) -> None:
    data = torchvision(name, tmp_path, image_size=4)
    assert data.image_shape == (1, 4, 4)
    assert bool((data.test_images == test).all())
    rows = data.validation_rows
    assert (None if rows is None else int(data.train_images[rows].max())) == validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "SVNH"}, "no dataset of that name; did you mean 'SVHN'"),
        ({"name": "ImageFolder"}, "no dataset of that name"),
        ({"name": 7}, "no dataset of that name"),
        ({"name": "SVHN"}, r"of 4×4 and 6×4 pixels; say torchvision\.image_size"),
        ({"name": "SVHN", "image_size": 0}, "image_size=0"),
        ({"name": "SVHN", "download": False}, "looked in .* for SVHN; torchvision says: Dataset"),
        ({"name": "CelebA", "image_size": 4}, r"labels of the train images .*: \[0, 1\]"),
        ({"name": "STL10", "image_size": 4}, "STL10 has no training split"),
    ],
)
def test_what_torchvision_cannot_give_is_one_line(
    options: dict[str, Any], message: str, toys: None, tmp_path: Path
) -> None:
    lines = [f"torchvision.{name} = {value!r}" for name, value in options.items()]
    lines += ["Experiment.dataset = @torchvision()", f"torchvision.root = '{tmp_path}'"]
    with pytest.raises(config.ConfigError, match=message) as caught:
        config.load(["digits"], lines)
    assert len(str(caught.value).splitlines()) == 1


class Rows(list[dict[str, Any]]):
    """The little that is needed of a split of `datasets`."""

    features: dict[str, Any]


class Value:
    pass


class ClassLabel:
    names = ("cat", "dog")


Picture = type("Image", (), {})


def rows(label: Any = (0, 1), features: dict[str, Any] | None = None, count: int = 12) -> Rows:
    found = Rows(
        {"image": Image.new("RGB", (4, 4), (index, 0, 0)), "label": label[index % 2], "id": index}
        for index in range(count)
    )
    found.features = {"id": Value(), "image": Picture(), "label": ClassLabel(), **(features or {})}
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the package `datasets` finds, by name."""
    found: dict[str, Any] = {}
    module: Any = ModuleType("datasets")
    module.load_dataset = lambda path, configuration: found[path]
    module.load_from_disk = lambda path: found["saved"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return found


def test_a_dataset_of_the_hub_is_read_by_its_columns(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["me/pets"] = {"train": rows(), "validation": rows(count=4), "test": rows((-1, -1))}
    data = hugging_face("me/pets")
    assert (data.name, data.class_names) == ("pets", ("cat", "dog"))
    assert data.train_images[:, 0, 0, 0].tolist() == list(range(12))
    assert data.train_labels.tolist() == data.test_labels.tolist() * 3 == [0, 1] * 6
    hub["saved"] = rows(("a", "b"), {"label": Value()})
    (tmp_path / "state.json").write_text("{}")
    saved = hugging_face(str(tmp_path), test_fraction=0.5)
    assert saved.class_names == ("a", "b")
    assert len(saved.train_labels) == len(saved.test_labels) == 6


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        ({"test": rows()}, {}, "has no split 'train'; it has test"),
        (rows(), {"label": "fine"}, "label='fine': the columns are id, image, label"),
        (rows((0, 1), {"coarse": ClassLabel()}), {}, "say which one is it, hugging_face.label"),
        (rows(), {"image": "id"}, "train images of me are int, no pictures"),
        ({"train": rows(), "test": rows((0, 2))}, {}, "the test images have the class 2"),
        (None, {}, "datasets cannot load 'me'"),
    ],
)
def test_what_the_hub_cannot_give_is_one_line(
    found: Any, options: dict[str, Any], message: str, hub: dict[str, Any]
) -> None:
    hub.update({} if found is None else {"me": found})
    with pytest.raises((ValueError, DatasetNotFoundError), match=message):
        hugging_face("me", **options)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'bilevel-dd\[datasets\]'"):
        hugging_face("me/pets")
