"""Stored images: what is read is the transformed image, wherever and however it is kept."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from torch import Tensor

from dd.data import KIPWhitening, PixelTransform, Standardize, ZCAWhitening
from dd.data.stored_images import LEAST_AT_ONCE, StoredImages, TransformedOnce

COUNT = 9
PIXELS = torch.randint(0, 256, (COUNT, 2, 3, 3), dtype=torch.uint8, generator=seeded(0))
TRANSFORMS = [Standardize.fit(PIXELS), ZCAWhitening.fit(PIXELS), KIPWhitening.fit(PIXELS)]

on_host = st.booleans()
transforms = st.sampled_from(TRANSFORMS)
some = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=12).map(torch.tensor)


@given(transform=transforms, on_host=on_host, rows=some, data=st.data())
def test_reading_a_subset_gives_its_transformed_images(
    transform: PixelTransform, on_host: bool, rows: Tensor, data: st.DataObject
) -> None:
    store = StoredImages(PIXELS, transform, on_host=on_host).subset(rows)
    expected = transform(PIXELS)[rows]
    assert len(store) == len(rows)
    assert store.shape == expected.shape
    position = st.integers(0, len(rows) - 1)
    index = torch.tensor(data.draw(st.lists(position, min_size=1, max_size=5)))
    torch.testing.assert_close(store[index], expected[index])
    start = data.draw(position)
    part = slice(start, data.draw(st.integers(start + 1, len(rows) + 3)))
    torch.testing.assert_close(store[part], expected[part])
    torch.testing.assert_close(store[:], expected)


@given(first=some, data=st.data())
def test_a_subset_of_a_subset(first: Tensor, data: st.DataObject) -> None:
    position = st.integers(0, len(first) - 1)
    second = torch.tensor(data.draw(st.lists(position, min_size=1, max_size=5)))
    store = StoredImages(PIXELS, TRANSFORMS[0])
    assert torch.equal(store.subset(first).subset(second)[:], store[first[second]])


def test_standardised_on_the_fly_to_the_same_bits() -> None:
    assert torch.equal(StoredImages(PIXELS, TRANSFORMS[0])[:], TRANSFORMS[0](PIXELS))


def test_without_a_transform_images_come_as_they_are() -> None:
    images = torch.rand(4, 1, 2, 2)
    assert torch.equal(StoredImages(images)[1:3], images[1:3])


@pytest.mark.parametrize("on_host", [False, True])
def test_reading_and_transforming_are_two_halves_of_indexing(on_host: bool) -> None:
    store = StoredImages(PIXELS, TRANSFORMS[1], on_host=on_host)
    index = torch.tensor([3, 0, 3])
    pixels = store.read(index)
    assert torch.equal(pixels, PIXELS[index])
    assert torch.equal(store.transformed(pixels), store[index])


# Transformed when they are first read.


@given(transform=transforms, reads=st.lists(some, min_size=1, max_size=5))
def test_images_that_are_transformed_once_are_the_transformed_images(
    transform: PixelTransform, reads: list[Tensor]
) -> None:
    store = StoredImages(TransformedOnce(PIXELS, transform))
    for rows in reads:
        torch.testing.assert_close(store[rows], transform(PIXELS)[rows])
    assert store.shape == PIXELS.shape


@pytest.mark.parametrize("whitening", [ZCAWhitening, KIPWhitening])
def test_whatever_is_read_first_the_bits_are_those_of_all_at_once(whitening: Any) -> None:
    """As whole datasets were whitened before anything was read, and resumed runs read otherwise."""
    pixels = torch.randint(0, 256, (700, 3, 16, 16), dtype=torch.uint8, generator=seeded(1))
    transform = whitening.fit(pixels)
    expected, store = transform(pixels), TransformedOnce(pixels, transform)
    order = torch.randperm(len(pixels), generator=seeded(2))
    for rows in (order[:1], order[:30], order[100:480], order[3:5], order):
        assert torch.equal(store[rows], expected[rows])


def test_each_image_is_transformed_once_beside_those_that_fill_up_a_product() -> None:
    seen: list[int] = []

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.float()

    count = 3 * LEAST_AT_ONCE
    store = TransformedOnce(torch.rand(count, 1, 2, 2), cast(PixelTransform, counting))
    everything = torch.arange(count)
    for rows in (everything[:1], everything[:LEAST_AT_ONCE], everything, everything):
        store[rows]
    assert seen == [LEAST_AT_ONCE, 2 * LEAST_AT_ONCE]
