"""Tiny-ImageNet and ImageNet in their own layouts."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_data import WNIDS, write_image, write_tiny_imagenet

from dd.data import DatasetNotFoundError, ImageDataset, imagenet, tiny_imagenet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_imagenet(tmp_path / "tiny")


def brightness(data: ImageDataset) -> tuple[list[int], list[int]]:
    """The red of every image to the nearest class of the fake data: 0, 1, 2."""
    parts = (data.train_images, data.test_images)
    first, second = ((images[:, 0].float().mean((1, 2)) / 40).int() - 1 for images in parts)
    return first.tolist(), second.tolist()


def test_tiny_imagenet(root: Path) -> None:
    data = tiny_imagenet(root, image_size=16)
    assert data.name == "tiny_imagenet"
    assert data.image_shape == (3, 16, 16)
    assert data.train_images.dtype == torch.uint8
    # Labels are places in wnids.txt; names are the first in words.txt, or the wnid.
    assert data.class_names == ("n03", "goldfish", "scorpion")
    assert torch.bincount(data.train_labels).tolist() == [8, 8, 8]
    assert torch.bincount(data.test_labels).tolist() == [3, 3, 3]
    assert brightness(data) == (data.train_labels.tolist(), data.test_labels.tolist())


def test_greyscale_becomes_rgb(root: Path) -> None:
    images = tiny_imagenet(root, image_size=16).train_images
    grey = (images[:, 0] == images[:, 1]).all(2).all(1) & (images[:, 1] == images[:, 2]).all(2).all(
        1
    )
    assert grey.nonzero().flatten().tolist() == [0, 8, 16]


def test_a_shorter_list_of_classes_gives_a_smaller_dataset(root: Path) -> None:
    (root / "wnids.txt").write_text("n02\nn03\n\n")
    data = tiny_imagenet(root, image_size=16)
    assert data.class_names == ("scorpion", "n03")
    assert (len(data.train_labels), len(data.test_labels)) == (16, 6)
    # n02 is class 2 of all three, n03 class 0.
    assert brightness(data) == tuple(
        [2 if label == 0 else 0 for label in labels]
        for labels in (data.train_labels, data.test_labels)
    )


def test_words_are_not_needed(root: Path) -> None:
    (root / "words.txt").unlink()
    assert tiny_imagenet(root, image_size=16).class_names == WNIDS


def test_the_size_of_the_originals_is_the_default_and_another_can_be_chosen(root: Path) -> None:
    assert tiny_imagenet(root).image_shape == (3, 64, 64)
    assert tiny_imagenet(root, image_size=8).image_shape == (3, 8, 8)


def test_nothing_is_written_beside_the_images(root: Path, tmp_path: Path) -> None:
    before = sorted(root.rglob("*"))
    tiny_imagenet(root, image_size=16, cache_folder=tmp_path / "cache")
    assert sorted(root.rglob("*")) == before
    assert len(list((tmp_path / "cache").rglob("images.npy"))) == 2


def annotate(line: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        with (root / "val" / "val_annotations.txt").open("a") as file:
            file.write(line)

    return change


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda root: (root / "wnids.txt").unlink(),
            DatasetNotFoundError,
            "wnids.txt.*unpack http",
        ),
        (lambda root: (root / "wnids.txt").write_text("\n"), ValueError, "lists no class"),
        (lambda root: (root / "wnids.txt").write_text("n01\nn01"), ValueError, "lists n01 twice"),
        (
            lambda root: (root / "wnids.txt").write_text("n01\nn04"),
            DatasetNotFoundError,
            "training images of n04 in train/n04/images/",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").unlink(),
            DatasetNotFoundError,
            "val_annotations.txt",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\n"),
            DatasetNotFoundError,
            "validation images of these classes",
        ),
        (annotate("val_7.JPEG n01"), ValueError, "line 10 is 'val_7.JPEG n01'; it must be"),
        (annotate("val_99.JPEG\tn01\n"), DatasetNotFoundError, "val/images/val_99.JPEG"),
    ],
)
def test_what_is_no_tiny_imagenet_is_refused(
    change: Callable[[Path], object], kind: type[Exception], message: str, root: Path
) -> None:
    change(root)
    with pytest.raises(kind, match=message) as raised:
        tiny_imagenet(root, image_size=16)
    assert str(root) in str(raised.value)


@pytest.mark.parametrize("source", [tiny_imagenet, imagenet])
def test_an_image_size_below_one_is_refused(
    source: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"image_size=0: it must be an integer in \[1, "):
        source(tmp_path, image_size=0)


@pytest.mark.skipif("DD_TINY_IMAGENET" not in os.environ, reason="DD_TINY_IMAGENET is not set")
def test_the_real_tiny_imagenet() -> None:
    data = tiny_imagenet(os.environ["DD_TINY_IMAGENET"])
    assert data.image_shape == (3, 64, 64)
    assert torch.bincount(data.train_labels).tolist() == [500] * data.num_classes
    assert torch.bincount(data.test_labels).tolist() == [50] * data.num_classes


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """ImageNet with two classes, in oblong pictures of different sizes."""
    root = tmp_path / "imagenet-2"
    for part, count in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(("n01", "n02")):
            for index in range(count):
                path = root / part / wnid / f"{wnid}_{index}.JPEG"
                write_image(path, 40 * (label + 1), (20 + index, 16), "L" if index == 1 else "RGB")
    return root


def test_imagenet(class_folders: Path) -> None:
    data = imagenet(class_folders, image_size=8)
    assert data.name == "imagenet-2"
    assert data.image_shape == (3, 8, 8)
    assert data.class_names == ("n01", "n02")
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert brightness(data) == (data.train_labels.tolist(), data.test_labels.tolist())


def test_imagenet_is_64_pixels_by_default(class_folders: Path) -> None:
    assert imagenet(class_folders).image_shape == (3, 64, 64)


def test_imagenet_errors(class_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"train/<class>/<image files> and val/<class>/"):
        imagenet(tmp_path / "absent")
    (class_folders / "val" / "n02").rename(class_folders / "val" / "n03")
    with pytest.raises(ValueError, match="same classes; only one of them has 'n02'"):
        imagenet(class_folders)
