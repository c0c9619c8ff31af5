"""Pixel transforms: inverses, closed forms, fitting in chunks, saved state, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dd.data import (
    KIPWhitening,
    LowRankKIP,
    LowRankZCA,
    PixelTransform,
    Standardize,
    ZCAWhitening,
    apply_in_chunks,
    kip_whitening,
    transform_from_state,
    zca_whitening,
)

FITS: dict[str, Callable[..., PixelTransform]] = {
    "standardize": Standardize.fit,
    "zca": ZCAWhitening.fit,
    "kip": KIPWhitening.fit,
    "zca_low_rank": lambda images, **options: LowRankZCA.of(ZCAWhitening.fit(images, **options), 3),
    "kip_low_rank": lambda images, **options: LowRankKIP.of(KIPWhitening.fit(images, **options), 3),
}
every_transform = pytest.mark.parametrize("kind", FITS)


@st.composite
def image_sets(draw: st.DrawFn) -> Tensor:
    """Correlated images [N, C, H, W], uint8 or float32 in [0, 1], fewer or more than pixels."""
    shape = (
        draw(st.integers(2, 40)),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(2, 4)),
        draw(st.integers(2, 4)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.rand(shape, generator=generator)
    brightness = torch.rand(shape[0], 1, 1, 1, generator=generator)
    images = (noise + brightness) / 2
    return (images * 255).round().to(torch.uint8) if draw(st.booleans()) else images


def some_images(count: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def normalized(flat: np.ndarray) -> np.ndarray:
    centered = flat - flat.mean(1, keepdims=True)
    return centered / np.linalg.norm(centered, axis=1, keepdims=True)


def whitened_moment(moment: np.ndarray, ridge: float) -> np.ndarray:
    """What C becomes under (C + ridge I)^(−1/2): C (C + ridge I)^(−1)."""
    return moment @ np.linalg.inv(moment + ridge * np.eye(len(moment)))


@given(image_sets())
def test_standardize_and_zca_are_inverted_exactly(images: Tensor) -> None:
    for transform in (Standardize.fit(images), ZCAWhitening.fit(images)):
        restored = transform.inverse(transform(images))
        torch.testing.assert_close(restored, pixels(images), rtol=0, atol=2e-5)


@given(image_sets())
def test_kip_is_inverted_up_to_each_images_mean_and_norm(images: Tensor) -> None:
    transform = KIPWhitening.fit(images)
    flat = pixels(images).double().flatten(1).numpy()
    norms = np.linalg.norm(flat - flat.mean(1, keepdims=True), axis=1)
    expected = normalized(flat) * norms.mean() + flat.mean()
    restored = transform.inverse(transform(images)).flatten(1).numpy()
    np.testing.assert_allclose(restored, expected, atol=2e-5 * max(1.0, norms.mean()))


@given(image_sets(), st.data())
def test_low_rank_whitening_is_the_whole_one_in_the_directions_it_keeps(
    images: Tensor, data: st.DataObject
) -> None:
    dimension = images[0].numel()
    rank = data.draw(st.integers(1, dimension - 1))
    full = ZCAWhitening.fit(images)
    low = LowRankZCA.of(full, rank)
    torch.testing.assert_close(low.inverse(low(images)), pixels(images), rtol=0, atol=2e-5)
    kept = full.state()["eigenvectors"][:, -rank:]
    whole, found = full(images).flatten(1), low(images).flatten(1)
    torch.testing.assert_close(found @ kept, whole @ kept, rtol=1e-4, atol=2e-5)
    # Of all multiples of the identity on the other directions, none is nearer on these images.
    outside = (pixels(images).flatten(1) - full.state()["mean"].flatten()) @ (
        torch.eye(dimension) - kept @ kept.T
    )
    errors = [(whole - found - shift * outside).double().norm() for shift in (0.0, 0.05, -0.05)]
    assert errors[0] <= min(errors) + 1e-5


@given(image_sets())
def test_low_rank_kip_forgets_what_kip_forgets(images: Tensor) -> None:
    full = KIPWhitening.fit(images)
    low = LowRankKIP.of(full, 2)
    expected = full.inverse(full(images))
    torch.testing.assert_close(low.inverse(low(images)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 48, 2.5])
def test_a_rank_that_cannot_be_is_refused(rank: int, tmp_path: Path) -> None:
    for fit in (kip_whitening, zca_whitening):
        with pytest.raises(ValueError, match=f"rank={rank}"):
            fit(some_images(), rank=rank, cache_folder=tmp_path)


@given(image_sets())
def test_standardize_gives_mean_0_and_std_1(images: Tensor) -> None:
    result = Standardize.fit(images)(images).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(result.mean(1), torch.zeros_like(result[:, 0]), rtol=0, atol=1e-5)
    std = result.std(1, correction=0)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-4)


@given(image_sets(), st.sampled_from([0.01, 0.1, 1.0]))
def test_zca_covariance_has_its_closed_form(images: Tensor, epsilon: float) -> None:
    flat = pixels(images).double().flatten(1).numpy()
    expected = whitened_moment(np.cov(flat, rowvar=False), epsilon)
    result = ZCAWhitening.fit(images, epsilon=epsilon)(images).flatten(1).double().numpy()
    np.testing.assert_allclose(np.cov(result, rowvar=False), expected, atol=2e-5)
    np.testing.assert_allclose(result.mean(0), 0, atol=2e-5)


@given(image_sets(), st.sampled_from([0.01, 0.1, 1.0]))
def test_kip_second_moment_has_its_closed_form(images: Tensor, regularization: float) -> None:
    flat = normalized(pixels(images).double().flatten(1).numpy())
    moment = flat.T @ flat / len(flat)
    expected = whitened_moment(moment, regularization * np.trace(moment) / len(moment))
    transform = KIPWhitening.fit(images, regularization=regularization)
    result = transform(images).flatten(1).double().numpy()
    np.testing.assert_allclose(result.T @ result / len(result), expected, atol=1e-4)


@given(image_sets())
def test_whitening_matrices_equal_an_independent_computation(images: Tensor) -> None:
    flat = pixels(images).double().flatten(1).numpy()
    left, values, _ = np.linalg.svd(np.cov(flat, rowvar=False))
    expected = (flat - flat.mean(0)) @ left @ np.diag((values + 0.1) ** -0.5) @ left.T
    result = ZCAWhitening.fit(images)(images).flatten(1).numpy()
    np.testing.assert_allclose(result, expected, atol=5e-5)


@given(image_sets(), st.sampled_from(sorted(FITS)))
def test_the_chunk_size_does_not_change_the_fit(images: Tensor, kind: str) -> None:
    in_parts, at_once = FITS[kind](images, chunk=7), FITS[kind](images, chunk=len(images))
    torch.testing.assert_close(in_parts(images), at_once(images), rtol=1e-5, atol=5e-5)


@given(image_sets(), st.sampled_from(sorted(FITS)))
def test_state_rebuilds_the_transform_bit_for_bit(images: Tensor, kind: str) -> None:
    transform = FITS[kind](images)
    state = {name: value.clone() for name, value in transform.state().items()}
    rebuilt = transform_from_state(kind, state)
    assert type(rebuilt) is type(transform)
    assert torch.equal(rebuilt(images), transform(images))
    assert torch.equal(rebuilt.inverse(rebuilt(images)), transform.inverse(transform(images)))


@given(image_sets(), st.sampled_from(sorted(FITS)), st.integers(1, 50))
def test_applying_in_chunks_equals_applying_at_once(images: Tensor, kind: str, chunk: int) -> None:
    transform = FITS[kind](images)
    result = apply_in_chunks(transform, images, chunk)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, transform(images), rtol=1e-5, atol=1e-5)


@every_transform
def test_only_the_training_images_matter(kind: str) -> None:
    transform = FITS[kind](some_images())
    before = {name: value.clone() for name, value in transform.state().items()}
    test_images = some_images(count=6, seed=1) ** 3
    together = transform(test_images)
    one_by_one = torch.cat([transform(image[None]) for image in test_images])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
    after = transform.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@every_transform
def test_transform_and_inverse_are_differentiable(kind: str) -> None:
    transform = FITS[kind](some_images())
    images = some_images(count=2, seed=1).requires_grad_()
    weight = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    direction = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for function in (transform.__call__, transform.inverse):
        (gradient,) = torch.autograd.grad((function(images) * weight).sum(), images)
        with torch.no_grad():
            step = 1e-2 * direction
            change = ((function(images + step) - function(images - step)) * weight).sum() / 2
        torch.testing.assert_close((gradient * step).sum(), change, rtol=2e-2, atol=1e-3)


@every_transform
def test_nothing_fitted_requires_grad(kind: str) -> None:
    transform = FITS[kind](some_images().requires_grad_())
    assert not any(value.requires_grad for value in transform.state().values())
    assert not transform(some_images()).requires_grad


@every_transform
def test_to_returns_a_new_equal_transform(kind: str) -> None:
    transform = FITS[kind](some_images())
    moved = transform.to("cpu")
    assert moved is not transform
    assert moved.device == transform.device == torch.device("cpu")
    assert torch.equal(moved(some_images()), transform(some_images()))


def test_kip_maps_a_constant_image_to_almost_nothing_and_keeps_derivatives_finite() -> None:
    transform = KIPWhitening.fit(some_images())
    image = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    result = transform(image)
    assert result.norm() < 0.1 * transform(some_images()).flatten(1).norm(dim=1).mean()
    (gradient,) = torch.autograd.grad(result.square().sum(), image, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), image)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def test_kip_ignores_brightness_and_contrast() -> None:
    transform = KIPWhitening.fit(some_images())
    images = some_images(seed=1)
    torch.testing.assert_close(transform(images), transform(0.5 * images + 0.2), atol=1e-4, rtol=0)


def test_standardize_leaves_a_constant_channel_at_zero() -> None:
    images = some_images()
    images[:, 1] = 0.3
    result = Standardize.fit(images)(images)
    torch.testing.assert_close(result[:, 1], torch.zeros_like(result[:, 1]))


def test_standardize_with_given_figures_fits_any_size() -> None:
    transform = Standardize((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    result = transform(torch.ones(2, 3, 5, 7))
    assert result[0, :, 0, 0].tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize("whitening", [ZCAWhitening, KIPWhitening])
def test_too_large_images_are_refused_before_any_work(
    whitening: type[ZCAWhitening] | type[KIPWhitening],
) -> None:
    images = torch.zeros(2, 3, 128, 128)
    with pytest.raises(ValueError, match=r"max_dimension = 12288.* 19\.3 GB.*Standardize"):
        whitening.fit(images)
    with pytest.raises(ValueError, match="max_dimension = 10"):
        whitening.fit(some_images(), max_dimension=10)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda: ZCAWhitening.fit(some_images(), epsilon=0.0), "epsilon=0.0"),
        (lambda: ZCAWhitening.fit(some_images(1)), "at least 2"),
        (lambda: KIPWhitening.fit(some_images(), regularization=-1.0), "regularization=-1.0"),
        (lambda: KIPWhitening.fit(torch.full((3, 1, 2, 2), 0.3)), "all constant"),
        (lambda: KIPWhitening.fit(some_images(), chunk=0), "chunk=0"),
        (lambda: Standardize.fit(some_images() * 255), r"must lie in \[0, 1\]"),
        (lambda: Standardize.fit(some_images().long()), "dtype torch.int64"),
        (lambda: Standardize.fit(some_images()[0]), r"must be \[N, C, H, W\]"),
        (lambda: Standardize((0.5,), (0.0,)), "must be positive"),
        (lambda: Standardize((0.5,), (1.0, 1.0)), "one value per channel"),
    ],
)
def test_fitting_errors_name_what_is_wrong(fit: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit()


@every_transform
def test_a_batch_that_does_not_fit_is_refused(kind: str) -> None:
    transform = FITS[kind](some_images())
    for function in (transform.__call__, transform.inverse):
        with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\); it must be \[N, 3, "):
            function(torch.zeros(2, 1, 4, 4))
        with pytest.raises(ValueError, match=r"dtype torch\.int64"):
            function(torch.zeros(2, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"transformed has dtype torch\.uint8"):
        transform.inverse(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="chunk=0"):
        apply_in_chunks(transform, some_images(), chunk=0)


@every_transform
def test_a_damaged_state_is_refused(kind: str) -> None:
    state = FITS[kind](some_images()).state()
    for name, value in state.items():
        lacking = {key: kept for key, kept in state.items() if key != name}
        with pytest.raises(ValueError, match=f"lacks the tensor '{name}'"):
            transform_from_state(kind, lacking)
        with pytest.raises(ValueError, match=f"'{kind}' transform .*must be"):
            transform_from_state(kind, {**state, name: torch.zeros(2, 2, 2, 2, 2)})
        with pytest.raises(ValueError, match=r"must be torch\."):
            transform_from_state(kind, {**state, name: value.double()})
    with pytest.raises(ValueError, match="unknown tensor 'bias'"):
        transform_from_state(kind, {**state, "bias": torch.zeros(3)})


@every_transform
def test_tensors_of_different_sizes_are_no_transform(kind: str) -> None:
    state = FITS[kind](some_images()).state()
    sized = [name for name, value in state.items() if value.dim() and value.is_floating_point()]
    for name in sized:
        longer = torch.cat([state[name], state[name][-1:]])
        with pytest.raises(ValueError, match=rf"'{kind}' transform .* must be .*\d"):
            transform_from_state(kind, {**state, name: longer})


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'pca'; allowed are 'kip', 'kip_low_rank', "):
        transform_from_state("pca", {})
