"""Cutting images into patches and putting them together: exact inverses, and so their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from torch import Tensor

from dd.synthetic.patches import compose_patches, split_patches

sizes = st.integers(1, 3)


@st.composite
def images(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Images in float64, and a number of patches per side that they can be cut into."""
    n = draw(sizes)
    shape = (draw(st.integers(0, 3)), draw(sizes), n * draw(sizes), n * draw(sizes))
    return torch.randn(shape, dtype=torch.float64, generator=seeded(draw(st.integers(0, 99)))), n


@given(case=images())
def test_composing_undoes_splitting(case: tuple[Tensor, int]) -> None:
    whole, n = case
    patches = split_patches(whole, n)
    assert patches.shape == (
        len(whole) * n**2,
        whole.shape[1],
        whole.shape[2] // n,
        whole.shape[3] // n,
    )
    assert torch.equal(compose_patches(patches, n), whole)
    assert torch.equal(split_patches(compose_patches(patches, n), n), patches)


@given(case=images())
def test_patches_come_image_by_image_and_row_by_row(case: tuple[Tensor, int]) -> None:
    whole, n = case
    height, width = whole.shape[2] // n, whole.shape[3] // n
    expected = [
        image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for image in whole
        for row in range(n)
        for column in range(n)
    ]
    patches = split_patches(whole, n)
    assert len(patches) == len(expected)
    for found, wanted in zip(patches, expected, strict=True):
        assert torch.equal(found, wanted)


@given(case=images())
def test_the_gradient_of_patches_is_that_of_the_whole_cut(case: tuple[Tensor, int]) -> None:
    whole, n = case
    weights = torch.randn(whole.shape, dtype=torch.float64, generator=seeded(1))

    def loss(images: Tensor) -> Tensor:
        return (weights * images.sin()).sum()

    whole = whole.requires_grad_()
    patches = split_patches(whole.detach(), n).requires_grad_()
    (of_whole,) = torch.autograd.grad(loss(whole), whole)
    (of_patches,) = torch.autograd.grad(loss(compose_patches(patches, n)), patches)
    assert torch.equal(of_patches, split_patches(of_whole, n))


def test_images_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="patches_per_side=4: images of 8×6 cannot be cut"):
        split_patches(torch.zeros(1, 3, 8, 6), 4)
