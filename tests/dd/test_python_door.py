"""What people have in Python, given to `dd.distil`: its pixels, or one line."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

import dd
import gin
from dd.api.bindings import dataset_bindings, keep
from dd.data import arrays, to_unit_range

COUNT, SIZE = 24, 8
LABELS = np.arange(COUNT) % 3
#: White above, and below a grey that says which image it is.
PIXELS = np.full((COUNT, SIZE, SIZE, 3), 255, np.uint8)
PIXELS[:, SIZE // 2 :] = 8 * np.arange(COUNT)[:, None, None, None]
TENSORS = torch.from_numpy(PIXELS).movedim(3, 1)


class Pairs(Dataset[Any]):
    def __init__(self, item: Callable[[int], Any], count: int = COUNT, **known: Any) -> None:
        self._item, self._count = item, count
        self.__dict__.update(known)

    def __getitem__(self, index: int) -> Any:
        return self._item(index)

    def __len__(self) -> int:
        return self._count


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((TENSORS[index], int(LABELS[index])) for index in range(COUNT))


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return TENSORS[index % COUNT], int(LABELS[index % COUNT])


def shown(mode: str, change: Callable[[Image.Image], Image.Image] = lambda image: image) -> Any:
    """Pillow's pictures of a mode."""
    made = Image.fromarray
    if mode == "P":
        return Pairs(lambda index: (made(PIXELS[index]).quantize(), int(LABELS[index])))
    if mode == "I;16":
        deep = PIXELS[..., 0].astype(np.uint16) * 257
        return Pairs(lambda index: (made(deep[index]), int(LABELS[index])))
    return Pairs(lambda index: (change(made(PIXELS[index]).convert(mode)), int(LABELS[index])))


def pictures(change: Callable[[Any], Any]) -> Dataset[Any]:
    return Pairs(lambda index: (change(index), int(LABELS[index])))


def labelled(change: Callable[[int], Any], **known: Any) -> Dataset[Any]:
    return Pairs(lambda index: (TENSORS[index], change(int(LABELS[index]))), **known)


TENSOR_PAIRS = TensorDataset(TENSORS, torch.from_numpy(LABELS))
NAMED = Pairs(lambda index: (TENSORS[index], int(LABELS[index])), classes=["cat", "dog", "owl"])
RIGHT: dict[str, Any] = {
    **{f"pictures, {mode}": shown(mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "CMYK")},
    "pictures, 16 bits": shown("I;16"),
    "arrays": pictures(lambda index: PIXELS[index]),
    "arrays, channels first": pictures(lambda index: PIXELS[index].transpose(2, 0, 1)),
    "arrays, grey": pictures(lambda index: PIXELS[index, :, :, 0]),
    "arrays, floats": pictures(lambda index: PIXELS[index] / 255),
    "tensors": pictures(lambda index: TENSORS[index] / 255),
    "tensors, grey": pictures(lambda index: TENSORS[index, 0]),
    "tensors, channels last": pictures(lambda index: torch.from_numpy(PIXELS[index])),
    "tensors that are learned": pictures(lambda index: (TENSORS[index] / 255).requires_grad_()),
    "tensors, brain floats": pictures(lambda index: (TENSORS[index] / 255).bfloat16()),
    "classes in tensors": labelled(torch.tensor),
    "classes in a row": labelled(lambda label: torch.tensor([label])),
    "classes as floats": labelled(float),
    "classes one-hot": labelled(lambda label: torch.eye(3)[label]),
    "classes by name": labelled(lambda label: "abc"[label]),
    "names of another kind": labelled(int, classes=3),
    "a part": Subset(TENSOR_PAIRS, range(COUNT)),
    "parts": ConcatDataset([TENSOR_PAIRS]),
    "a list": [TENSOR_PAIRS[index] for index in range(COUNT)],
    "a pair of lists": (list(TENSORS), LABELS.tolist()),
    "a pair, reversed": (PIXELS[::-1], LABELS[::-1]),
    "a pair, learned": ((TENSORS / 255).requires_grad_(), LABELS),
    "a pair, sparse": ((TENSORS / 255).to_sparse(), LABELS),
    "a pair, names as objects": (PIXELS, np.array(["cat", "dog", "owl"], dtype=object)[LABELS]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_understood_is_kept_as_it_looks(name: str, tmp_path: Path) -> None:
    bindings, content = dataset_bindings(RIGHT[name], tmp_path, SIZE)
    keep(content, may_differ=False)
    channels = "first" if bindings[-1].startswith("arrays.channels") else None
    found = arrays(tmp_path / "dataset.npz", test_fraction=0.25, channels=channels)
    images = to_unit_range(torch.cat([found.train_images, found.test_images]))
    labels = torch.cat([found.train_labels, found.test_labels])
    which = (images[:, :, -1, -1].mean(1) * 255 / 8).round().long()
    assert sorted(which.tolist()) == list(range(COUNT))
    assert torch.equal(labels, which % 3)
    expected = TENSORS[which] / 255
    torch.testing.assert_close(images, expected[:, : images.shape[1]], rtol=0, atol=0.02)


@pytest.mark.parametrize("part", [NAMED, Subset(NAMED, range(COUNT))])
def test_the_names_of_classes_are_kept(part: Dataset[Any], tmp_path: Path) -> None:
    _, content = dataset_bindings(part, tmp_path, SIZE)
    (held,) = content.values()
    assert held["class_names"].tolist() == ["cat", "dog", "owl"]


ONE = (TENSORS[0], 0)
WRONG: dict[str, tuple[Any, str]] = {
    "sizes": (pictures(lambda index: TENSORS[index, :, index % 2 :]), "shapes (3, 8, 8) and"),
    "modes": (
        pictures(lambda index: Image.fromarray(PIXELS[index]).convert(["L", "RGB"][index % 2])),
        "shapes (1, 8, 8) and (3, 8, 8)",
    ),
    "five dimensions": (
        pictures(lambda index: TENSORS[None, None, index]),
        "dataset[0]: its image",
    ),
    "halves of classes": (labelled(lambda label: label + 0.5), "dataset[0]: its class is 0.5"),
    "classes not a number": (labelled(lambda label: float("nan")), "its class is nan"),
    "no classes": (labelled(lambda label: None), "NoneType"),
    "several classes": (labelled(lambda label: torch.ones(3)), "dataset[0]: its class is tensor"),
    "dicts": (Pairs(lambda index: {"image": TENSORS[index]}), "dataset[0] is a dict"),
    "threes": (Pairs(lambda index: (*ONE, index)), "dataset[0] is a tuple of 3"),
    "images alone": (TENSORS, "dataset[0] is a Tensor"),
    "a list of two arrays": ([PIXELS, LABELS], "dataset[0] is a ndarray"),
    "nothing": (Pairs(lambda index: ONE, 0), "dataset is empty"),
    "a stream": (Stream(), "list(dataset)"),
    "no length": (Endless(), "list(dataset)"),
    "batches": (DataLoader(TENSOR_PAIRS), "list(dataset)"),
    "a table": ({"images": PIXELS, "labels": LABELS}, "dataset is a dict"),
    "None": (None, "dataset is a NoneType"),
    "bytes": (b"abc", "dataset is a bytes"),
    "no name": ("", "dataset='' is empty"),
    "a ragged pair": (([PIXELS[0], PIXELS[1][:4]], [0, 1]), "a list is no array"),
    "objects": ((np.array([None] * COUNT), LABELS), "no array of numbers or names"),
    "without values": ((TENSORS.to("meta"), LABELS), "'meta' has no values"),
    "out of range": ((TENSORS / 127.5 - 1, LABELS), "values from -1.0 to 1.0"),
    "not a number": ((TENSORS / torch.zeros(()), LABELS), "values from nan"),
    "swapped": ((LABELS, PIXELS), "images has shape (24,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    given, said = WRONG[name]
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        dd.distil(given, run_dir=tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nowhere", "a" * 5000, "Digits", "a\0b", "https://x.y/z.zip"])
def test_a_name_of_nothing_is_told_with_those_of_datasets(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such dataset; [^\n]+$") as error:
        dd.distil(name, run_dir=tmp_path / "run")
    assert "standardize" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_name_that_two_modules_have_stands_in_the_way_of_no_message(tmp_path: Path) -> None:
    for module in ("one", "two"):
        gin.external_configurable(lambda: None, name="of_both", module=module)
    with pytest.raises(FileNotFoundError, match="no such dataset") as error:
        dd.distil("of_bot", run_dir=tmp_path / "run")
    assert "of_both" not in str(error.value)


def test_a_folder_takes_other_data_until_a_run_has_begun(tmp_path: Path) -> None:
    first, second = ({tmp_path / "a.npz": {"images": PIXELS + shift}} for shift in (0, 1))
    (tmp_path / "a.npz").write_bytes(b"half written")
    keep(first, may_differ=True)
    keep(second, may_differ=True)
    keep(second, may_differ=False)
    with pytest.raises(ValueError, match="holds other data"):
        keep(first, may_differ=False)
