"""Augmentations: what is drawn, from where, and what it does to an image."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dd.augmentation import DSA, Augmentation, FlipOrRotate, NoAugmentation, families

Family = Callable[[Tensor, torch.Generator], Tensor]

FAMILIES: dict[str, Family] = {
    "flip": partial(families.flip, probability=0.5),
    "rotate": partial(families.rotate, degrees=15.0),
    "scale": partial(families.scale, ratio=1.2),
    "crop": partial(families.crop, padding=0.125),
    "cutout": partial(families.cutout, fraction=0.5),
    "brightness": partial(families.brightness, ratio=1.0),
    "saturation": partial(families.saturation, ratio=2.0),
    "contrast": partial(families.contrast, ratio=0.5),
}
AUGMENTATIONS: dict[str, Augmentation] = {
    "none": NoAugmentation(),
    "flip_or_rotate": FlipOrRotate(),
    "dsa": DSA(),
}
RANDOM: dict[str, Family] = {
    **FAMILIES,
    **{name: augment for name, augment in AUGMENTATIONS.items() if name != "none"},
}
EVERYTHING: dict[str, Family] = {**FAMILIES, **AUGMENTATIONS}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_random = pytest.mark.parametrize("augment", RANDOM.values(), ids=RANDOM)
each = pytest.mark.parametrize("augment", EVERYTHING.values(), ids=EVERYTHING)
quick = settings(max_examples=15, deadline=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(1))


@each
@quick
@given(
    count=st.integers(1, 4),
    channels=st.integers(1, 4),
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_shape_and_dtype_are_kept_and_the_input_is_not_written_to(
    augment: Family,
    count: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    images = batch(count, channels, height, width, dtype=dtype)
    before = images.clone()
    augmented = augment(images, seeded(seed))
    assert augmented.shape == images.shape
    assert augmented.dtype == dtype
    assert augmented.isfinite().all()
    assert torch.equal(images, before)


@each
def test_the_seed_alone_decides(augment: Family) -> None:
    images = batch(6, 3, 8, 8)
    torch.manual_seed(0)
    first = augment(images, seeded(3))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert torch.equal(augment(images, seeded(3)), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@each_random
def test_another_seed_is_another_draw(augment: Family) -> None:
    images = batch(16, 3, 8, 8)
    assert not torch.equal(augment(images, seeded(0)), augment(images, seeded(1)))


@each_random
def test_the_generator_moves_on(augment: Family) -> None:
    images, generator = batch(16, 3, 8, 8), seeded(0)
    assert not torch.equal(augment(images, generator), augment(images, generator))


@each
def test_grad_mode_and_precision_do_not_change_the_draw(augment: Family) -> None:
    images = batch(5, 3, 8, 8).requires_grad_()
    reference = augment(images, seeded(2))
    with torch.no_grad():
        assert torch.equal(augment(images, seeded(2)), reference)
        single = augment(images.float(), seeded(2))
    torch.testing.assert_close(single.double(), reference.detach(), atol=1e-5, rtol=1e-5)


@each
@pytest.mark.parametrize("seed", range(2))
def test_gradient(augment: Family, seed: int) -> None:
    images = batch(2, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, seeded(seed)), (images,))


@each_family
def test_each_image_has_its_own_parameters(family: Family) -> None:
    images = batch(1, 3, 16, 16).expand(16, -1, -1, -1)
    augmented = family(images, seeded(0))
    distinct = torch.unique(augmented.flatten(1), dim=0)
    # A flip has two outcomes; of the others, even the coarsest (crop) has 25.
    assert len(distinct) > 8 or (family is FAMILIES["flip"] and len(distinct) == 2)


@each_family
@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_what_is_not_a_batch_of_images_is_refused(family: Family, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images has shape .* \[N, C, H, W\]"):
        family(images, seeded(0))


@pytest.mark.parametrize(
    ("family", "tolerance"),
    [
        (partial(families.flip, probability=0.0), 0.0),
        (partial(families.rotate, degrees=0.0), 1e-12),
        (partial(families.scale, ratio=1.0), 1e-12),
        (partial(families.crop, padding=0.0), 0.0),
        (partial(families.cutout, fraction=0.0), 0.0),
        (partial(families.brightness, ratio=0.0), 0.0),
    ],
    ids=["flip", "rotate", "scale", "crop", "cutout", "brightness"],
)
def test_no_strength_is_the_identity(family: Family, tolerance: float) -> None:
    images = batch(4, 3, 9, 6)
    torch.testing.assert_close(family(images, seeded(0)), images, atol=tolerance, rtol=0.0)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (partial(families.flip, probability=1.5), "probability"),
        (partial(families.rotate, degrees=-1.0), "degrees"),
        (partial(families.scale, ratio=0.5), "ratio"),
        (partial(families.crop, padding=2.0), "padding"),
        (partial(families.cutout, fraction=-0.1), "fraction"),
        (partial(families.brightness, ratio=-1.0), "ratio"),
        (partial(families.saturation, ratio=-1.0), "ratio"),
        (partial(families.contrast, ratio=math.nan), "ratio"),
    ],
)
def test_a_strength_out_of_range_is_refused(family: Family, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*must be in \["):
        family(batch(1, 1, 4, 4), seeded(0))


def test_flipping_twice_is_the_identity() -> None:
    images = batch(8, 3, 6, 7)
    flipped = families.flip(images, seeded(0), probability=0.5)
    assert not torch.equal(flipped, images)
    assert torch.equal(families.flip(flipped, seeded(0), probability=0.5), images)
    assert torch.equal(families.flip(images, seeded(0), probability=1.0), images.flip(-1))


@quick
@given(seed=st.integers(0, 2**31), aspect=st.sampled_from(((21, 21), (33, 17), (17, 33))))
def test_a_rotation_keeps_distances_to_the_centre(seed: int, aspect: tuple[int, int]) -> None:
    # Two blobs, right of and below the centre, end up where their common rotation says.
    height, width = aspect
    rows = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    columns = torch.arange(width, dtype=torch.float64)[None, :] - (width - 1) / 2
    right = torch.exp(-((rows**2 + (columns - 4) ** 2) / 3))
    below = torch.exp(-(((rows - 4) ** 2 + columns**2) / 3))
    rotated = families.rotate(torch.stack((right, below))[None], seeded(seed), degrees=15.0)[0]
    mass = rotated.sum((1, 2))
    x, y = (rotated * columns).sum((1, 2)) / mass, (rotated * rows).sum((1, 2)) / mass
    torch.testing.assert_close(x.hypot(y), torch.full_like(x, 4.0), atol=0.05, rtol=0.0)
    assert math.isclose(float(x[0] * x[1] + y[0] * y[1]), 0.0, abs_tol=0.2)
    assert abs(math.degrees(math.atan2(y[0], x[0]))) < 15.5


@quick
@given(seed=st.integers(0, 2**31))
def test_a_scale_stretches_each_axis_within_its_range(seed: int) -> None:
    axis = torch.arange(41, dtype=torch.float64) - 20
    images = torch.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / 18)[None, None]
    scaled = families.scale(images, seeded(seed), ratio=1.2)[0, 0]
    deviations = [
        float(((marginal * axis**2).sum() / marginal.sum()).sqrt())
        for marginal in (scaled.sum(0), scaled.sum(1))
    ]
    assert all(3 / 1.2 - 0.05 < deviation < 3 * 1.2 + 0.05 for deviation in deviations)
    assert deviations[0] != pytest.approx(deviations[1], abs=1e-9)


@quick
@given(seed=st.integers(0, 2**31), height=st.integers(4, 20), width=st.integers(4, 20))
def test_a_crop_is_a_whole_pixel_shift(seed: int, height: int, width: int) -> None:
    # Positive pixels, so that a zero can only have come in from the padding.
    images = batch(3, 2, height, width).abs() + 1
    cropped = families.crop(images, seeded(seed), padding=0.25)
    for image, shifted in zip(images, cropped, strict=True):
        matches = [
            torch.equal(torch.roll(image, (down, right), (1, 2))[:, kept], shifted[:, kept])
            for down in range(-math.floor(height / 4 + 0.5), math.floor(height / 4 + 0.5) + 1)
            for right in range(-math.floor(width / 4 + 0.5), math.floor(width / 4 + 0.5) + 1)
            if (kept := shifted[0] != 0).sum() == (height - abs(down)) * (width - abs(right))
        ]
        assert any(matches)


def test_a_crop_reaches_every_position_and_no_other() -> None:
    images = torch.zeros(2000, 1, 9, 9)
    images[:, :, 4, 4] = 1
    cropped = families.crop(images, seeded(0), padding=0.2)
    assert torch.equal(cropped.sum((1, 2, 3)), torch.ones(2000))
    reached = cropped.sum((0, 1)) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True
    assert torch.equal(reached, expected)


@quick
@given(seed=st.integers(0, 2**31), height=st.integers(2, 12), width=st.integers(2, 12))
def test_a_cutout_is_one_rectangle_of_zeros(seed: int, height: int, width: int) -> None:
    images = batch(4, 2, height, width)
    for image, result in zip(
        images, families.cutout(images, seeded(seed), fraction=0.5), strict=True
    ):
        hole = result[0] == 0
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None, :])
        for inside, size in ((rows, height), (columns, width)):
            places = inside.nonzero().flatten()
            length = math.floor(size / 2 + 0.5)
            assert length // 2 <= len(places) <= length
            assert len(places) == places[-1] - places[0] + 1
        assert torch.equal(result[:, ~hole], image[:, ~hole])


def test_a_cutout_covers_the_borders_as_its_mirror_image() -> None:
    images = torch.ones(20_000, 1, 8, 8)
    covered = 1 - families.cutout(images, seeded(0), fraction=0.5).mean((0, 1))
    torch.testing.assert_close(covered, covered.flip(0), atol=0.02, rtol=0.0)
    torch.testing.assert_close(covered, covered.flip(1), atol=0.02, rtol=0.0)


def test_colours_follow_their_formulas() -> None:
    images = batch(2000, 3, 4, 4)
    shift = families.brightness(images, seeded(0), ratio=1.0) - images
    assert shift.flatten(1).std(1).max() < 1e-12
    assert -0.5 <= shift.min() <= -0.49
    assert 0.49 <= shift.max() <= 0.5

    mean = images.mean(1, keepdim=True)
    factor = (families.saturation(images, seeded(0), ratio=2.0) - mean) / (images - mean)
    assert factor.flatten(1).std(1).max() < 1e-8
    assert -1e-8 <= factor.min() <= 0.02
    assert 1.98 <= factor.max() <= 2 + 1e-8

    mean = images.mean((1, 2, 3), keepdim=True)
    factor = (families.contrast(images, seeded(0), ratio=0.5) - mean) / (images - mean)
    assert factor.flatten(1).std(1).max() < 1e-8
    assert 0.5 - 1e-8 <= factor.min() <= 0.51
    assert 1.49 <= factor.max() <= 1.5 + 1e-8


def test_no_augmentation_draws_nothing() -> None:
    images, generator = batch(2, 3, 4, 4), seeded(0)
    before = generator.get_state()
    assert torch.equal(NoAugmentation()(images, generator), images)
    assert torch.equal(generator.get_state(), before)


def test_flip_or_rotate_draws_one_family_a_batch_evenly() -> None:
    images, generator = batch(4, 1, 8, 8), seeded(0)
    flips = 0
    for _ in range(400):
        augmented = FlipOrRotate()(images, generator)
        is_flipped = [
            torch.equal(a, b) or torch.equal(a, b.flip(-1))
            for a, b in zip(augmented, images, strict=True)
        ]
        assert all(is_flipped) or not any(is_flipped)
        flips += all(is_flipped)
    assert 150 < flips < 250


def test_dsa_draws_every_family_of_its_strategy() -> None:
    images, generator = batch(4, 3, 8, 8), seeded(0)
    choices = []
    for _ in range(300):
        state = generator.get_state()
        augmented = DSA("flip_scale_cutout")(images, generator)
        after_choice = torch.Generator()
        after_choice.set_state(state)
        torch.randint(3, (), generator=after_choice)
        state = after_choice.get_state()
        for name in ("flip", "scale", "cutout"):
            after_choice.set_state(state)
            if torch.equal(FAMILIES[name](images, after_choice), augmented):
                choices.append(name)
    assert len(choices) == 300
    assert all(70 < choices.count(name) < 130 for name in ("flip", "scale", "cutout"))


@pytest.mark.parametrize("strategy", ["flip_blur", "", "flip__crop", "Flip"])
def test_dsa_refuses_an_unknown_family(strategy: str) -> None:
    with pytest.raises(ValueError, match=r"unknown family .* color, crop, cutout"):
        DSA(strategy)
