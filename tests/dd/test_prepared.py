"""Prepared data: who sees which images, and the order in which real batches come."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Key
from dd.augmentation import FlipOrRotate, NoAugmentation
from dd.data import ImageDataset, KIPWhitening, PixelTransform, Standardize, ZCAWhitening
from dd.data.prepared import PreparedData, RealBatches, prepare
from dd.data.stored_images import StoredImages

CPU = torch.device("cpu")
FITS = {"standardize": Standardize.fit, "zca": ZCAWhitening.fit, "kip": KIPWhitening.fit}
seeds = st.integers(0, 2**31)


def dataset(count: int = 60) -> ImageDataset:
    """Random images, no two alike, of three classes."""
    generator = torch.Generator().manual_seed(0)
    return ImageDataset(
        name="tiny",
        train_images=torch.rand(count, 1, 4, 4, generator=generator),
        train_labels=torch.arange(count) % 3,
        test_images=torch.rand(9, 1, 4, 4, generator=generator),
        test_labels=torch.arange(9) % 3,
        class_names=("a", "b", "c"),
    )


def prepared(
    fit: object = Standardize.fit, seed: int = 0, images_on: str = "device"
) -> PreparedData:
    return prepare(dataset(), fit, 0.2, seed, CPU, images_on)  # type: ignore[arg-type]


def rows(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in images.flatten(1)}


@given(seed=seeds)
def test_the_parts_are_disjoint_and_complete(seed: int) -> None:
    raw, data = dataset(), prepared(Standardize([0.0], [1.0]), seed)
    train, validation = rows(data.train_images[:]), rows(data.validation_images[:])
    assert len(train) == 48
    assert len(validation) == 12
    assert train | validation == rows(raw.train_images)
    assert torch.equal(data.test_images[:], raw.test_images)
    assert torch.equal(data.test_labels, raw.test_labels)


def test_images_keep_their_labels_and_validation_is_stratified() -> None:
    raw, data = dataset(), prepared(Standardize([0.0], [1.0]))
    label_of = {
        tuple(image.flatten().tolist()): int(label)
        for image, label in zip(raw.train_images, raw.train_labels, strict=True)
    }
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.validation_images, data.validation_labels),
    ):
        assert [label_of[tuple(image.flatten().tolist())] for image in images[:]] == labels.tolist()
    assert torch.bincount(data.validation_labels).tolist() == [4, 4, 4]


def test_another_seed_holds_out_others() -> None:
    first, again, other = (prepared(Standardize([0.0], [1.0]), seed) for seed in (1, 1, 2))
    assert torch.equal(first.validation_images[:], again.validation_images[:])
    assert rows(first.validation_images[:]) != rows(other.validation_images[:])


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_the_transform_is_fitted_on_the_training_part_alone(fit: object) -> None:
    seen = []

    def spy(images: Tensor) -> PixelTransform:
        seen.append(images)
        return fit(images)  # type: ignore[operator]

    raw, data = dataset(), prepared(spy)
    train, validation = raw.split_validation(0.2, seed=0)
    assert len(seen) == 1
    assert torch.equal(seen[0], raw.train_images[train])
    transform = fit(raw.train_images[train])  # type: ignore[operator]
    for found, wanted in (
        (data.train_images, raw.train_images[train]),
        (data.validation_images, raw.train_images[validation]),
        (data.test_images, raw.test_images),
    ):
        torch.testing.assert_close(found[:], transform(wanted))
    for name, value in transform.state().items():
        torch.testing.assert_close(data.transform.state()[name], value)


def test_a_fitted_transform_is_used_as_it_is() -> None:
    data = prepared(Standardize([0.25], [0.5]))
    assert float(data.transform.state()["mean"]) == 0.25
    assert torch.equal(data.test_images[:], (dataset().test_images - 0.25) / 0.5)


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_images_on_the_host_are_those_on_the_device(fit: object) -> None:
    device, host = (prepared(fit, images_on=place) for place in ("device", "host"))
    for part in ("train_images", "validation_images", "test_images"):
        torch.testing.assert_close(getattr(host, part)[:], getattr(device, part)[:])


@pytest.mark.parametrize(
    ("kind", "images_on", "dtype"),
    [
        ("standardize", "device", torch.uint8),
        ("standardize", "host", torch.uint8),
        ("zca", "device", torch.float32),
        ("kip", "device", torch.float32),
        ("kip", "host", torch.uint8),
    ],
)
def test_how_images_are_held(kind: str, images_on: str, dtype: torch.dtype) -> None:
    raw = dataset()
    bytes_ = [(images * 255).to(torch.uint8) for images in (raw.train_images, raw.test_images)]
    raw = dataclasses.replace(raw, train_images=bytes_[0], test_images=bytes_[1])
    data = prepare(raw, FITS[kind], 0.2, 0, CPU, images_on)
    for images in (data.train_images, data.validation_images, data.test_images):
        assert isinstance(images, StoredImages)
        assert images.read(slice(None)).dtype == dtype


def test_of_a_large_set_a_random_part_of_the_training_images_is_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dd.data.prepared.MOST_FITTED", 10)
    seen: list[Tensor] = []

    def spy(images: Tensor) -> PixelTransform:
        seen.append(images)
        return Standardize([0.0], [1.0])

    for seed in (0, 0, 1):
        data = prepared(spy, seed)
        assert len(rows(seen[-1])) == 10
        assert rows(seen[-1]) < rows(data.train_images[:])
    assert torch.equal(seen[0], seen[1])
    assert rows(seen[1]) != rows(seen[2])


def batches(
    count: int,
    size: int,
    seed: int = 0,
    augmentation: object = None,
    channels: int = 1,
    on_host: bool = False,
) -> RealBatches:
    """Images that are filled with their own index."""
    images = torch.arange(float(count))[:, None, None, None].repeat(1, channels, 4, 4)
    chosen = NoAugmentation() if augmentation is None else augmentation
    store = StoredImages(images, on_host=on_host)
    return RealBatches(store, torch.arange(count), size, chosen, Key(seed))  # type: ignore[arg-type]


def indices(real: RealBatches, step: int) -> list[int]:
    images, labels = real.at(step)
    assert torch.equal(images[:, 0, 0, 0].long(), labels)
    return labels.tolist()


@given(size=st.integers(1, 8), per_epoch=st.integers(1, 5), extra=st.integers(0, 7), seed=seeds)
def test_an_epoch_repeats_no_image_and_leaves_out_less_than_a_batch(
    size: int, per_epoch: int, extra: int, seed: int
) -> None:
    count = size * per_epoch + extra % size
    real = batches(count, size, seed)
    for epoch in range(2):
        drawn = [indices(real, epoch * per_epoch + step) for step in range(per_epoch)]
        assert all(len(batch) == size for batch in drawn)
        flat = [index for batch in drawn for index in batch]
        assert len(set(flat)) == len(flat) == count - extra % size


def test_each_epoch_has_another_order() -> None:
    real = batches(20, 20)
    orders = {tuple(indices(real, epoch)) for epoch in range(5)}
    assert len(orders) == 5
    assert tuple(range(20)) not in orders
    assert indices(batches(20, 20, seed=1), 0) != indices(batches(20, 20, seed=0), 0)


@given(
    steps=st.lists(st.integers(0, 11), min_size=1, max_size=8), seed=seeds, on_host=st.booleans()
)
def test_a_batch_is_a_pure_function_of_its_step_wherever_it_is_read_from(
    steps: list[int], seed: int, on_host: bool
) -> None:
    sequential, random_access = (
        batches(10, 3, seed, FlipOrRotate(), on_host=place) for place in (False, on_host)
    )
    expected = [sequential.at(step) for step in range(12)]
    for step in steps:
        images, labels = random_access.at(step)
        assert torch.equal(images, expected[step][0])
        assert torch.equal(labels, expected[step][1])


def test_augmentation_differs_between_steps_of_an_epoch() -> None:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alike = image.repeat(10, 1, 1, 1)
    real = RealBatches(alike, torch.zeros(10, dtype=torch.int64), 1, FlipOrRotate(), Key(0))
    assert len({tuple(real.at(step)[0].flatten().tolist()) for step in range(10)}) > 2


def test_a_batch_larger_than_the_set_is_the_set() -> None:
    real = batches(5, 100)
    for step in range(3):
        assert sorted(indices(real, step)) == list(range(5))
