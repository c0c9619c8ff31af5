"""What is stored of images: its size, its start, its decoding, and runs with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from tiny_runs import arguments, one_error, results_of
from torch import Tensor

from bilevel import ConfigurationError
from dd import evaluate, train
from dd.evaluation.distilled_set import DistilledSet
from dd.synthetic import (
    Bases,
    MultiFormation,
    Parameterisation,
    Patches,
    Pixels,
    SyntheticDataset,
)

SHAPE = (2, 8, 8)
CLASSES = 4
#: Each with how many images of a class are decoded from the floats of two.
FORMS: dict[str, tuple[Parameterisation, int]] = {
    "Pixels": (Pixels(), 2),
    "Patches": (Patches(2), 2),
    "MultiFormation": (MultiFormation(2), 8),
    # Of 1,024 floats 320 are in ten bases of 2×4×4, which leaves 17 images of ten coefficients.
    "Bases": (Bases(10), 17),
}
seeds = st.integers(0, 2**31)
each_form = st.sampled_from(list(FORMS))


def real(count: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *SHAPE, generator=seeded(seed)), torch.arange(count) % CLASSES


def made(name: str, seed: int = 0, **arguments: Any) -> tuple[SyntheticDataset, dict[str, Tensor]]:
    dataset = SyntheticDataset(2, "real", parameterisation=FORMS[name][0], **arguments)
    return dataset, dataset.create(*real(), CLASSES, seeded(seed))


def in_float64(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in stored.items()}


# What is stored, and decoded.


@pytest.mark.parametrize("name", FORMS)
def test_what_is_stored_takes_no_more_floats_than_plain_images(name: str) -> None:
    dataset, outer = made(name)
    per_class = FORMS[name][1]
    assert dataset.images(outer).shape == (CLASSES * per_class, *SHAPE)
    assert dataset.classes(outer).tolist() == [c for c in range(4) for _ in range(per_class)]
    stored = sum(value.numel() for value in dataset.stored(outer).values())
    assert stored <= 2 * CLASSES * 128
    assert stored == 2 * CLASSES * 128 or name == "Bases"


@pytest.mark.parametrize(("number", "per_class"), [(36, 8), (16, 115)])
def test_bases_leave_room_for_the_images_that_the_docstring_says(
    number: int, per_class: int
) -> None:
    assert Bases(number).per_class(1, 10, (3, 32, 32), 0) == per_class


@given(seed=seeds)
def test_a_label_that_is_learned_takes_its_place(seed: int) -> None:
    dataset, outer = made("Bases", seed, learn_labels=True)
    # 704 floats for 4 classes of images with 10 coefficients and 4 entries of a label.
    assert outer["coefficients"].shape == (CLASSES, 12, 10)
    assert torch.equal(dataset.labels(outer), torch.eye(CLASSES).repeat_interleave(12, dim=0))


@given(name=each_form, seed=seeds, classes=st.integers(1, 4), per_class=st.integers(1, 2))
def test_a_batch_is_of_the_decoded_images(
    name: str, seed: int, classes: int, per_class: int
) -> None:
    dataset, outer = made(name, classes_per_step=classes, batch_per_class=per_class)
    images, labels = dataset.batch(outer, seeded(seed))
    whole = dataset.images(outer)
    assert images.shape == (classes * per_class, *SHAPE)
    for image, label in zip(images, labels, strict=True):
        same = torch.isclose(whole, image, rtol=1e-5, atol=1e-6).flatten(1).all(1)
        assert (dataset.classes(outer)[same] == label).all()
        assert same.any()


@given(name=each_form, seed=seeds)
@settings(max_examples=20)
def test_decoding_has_the_derivative_of_what_it_computes(name: str, seed: int) -> None:
    form = FORMS[name][0]
    stored = in_float64(made(name, seed)[1])
    chosen = torch.tensor([3, 0, 3])
    values = [value.requires_grad_() for value in stored.values()]

    def decoded(*tensors: Tensor) -> Tensor:
        images = form.decode(dict(zip(stored, tensors, strict=True)), chosen)
        return images[:, :, ::3, ::3]

    assert torch.autograd.gradcheck(decoded, values, fast_mode=True)


@given(seed=seeds, one=st.floats(-3, 3), other=st.floats(-3, 3))
def test_decoding_is_linear_in_coefficients_and_in_bases(
    seed: int, one: float, other: float
) -> None:
    form, (first, second) = Bases(10), (in_float64(made("Bases", s)[1]) for s in (seed, seed + 1))
    for name in form.names:
        mixed = {**first, name: one * first[name] + other * second[name]}
        expected = one * form.decode(first) + other * form.decode({**first, name: second[name]})
        torch.testing.assert_close(form.decode(mixed), expected)


@given(seed=seeds)
def test_a_coded_image_is_the_combination_that_the_formula_says(seed: int) -> None:
    stored = in_float64(made("Bases", seed)[1])
    decoded = Bases(10).decode(stored)
    image = sum(a * b for a, b in zip(stored["coefficients"][1, 2], stored["bases"], strict=True))
    expected = torch.nn.functional.interpolate(
        torch.as_tensor(image)[None], size=8, mode="bilinear"
    )
    torch.testing.assert_close(decoded[17 + 2], expected[0])


# The start.


@given(seed=seeds)
def test_the_start_of_bases_is_the_best_combination_of_so_many(seed: int) -> None:
    images, _ = real(68, seed)
    small = torch.nn.functional.avg_pool2d(images, 2).flatten(1).double()
    stored = Bases(10).encode(images, CLASSES)
    squares = stored["bases"].double().square().mean((1, 2, 3))
    torch.testing.assert_close(squares, small.square().mean().expand(10), rtol=1e-4, atol=0)
    found = stored["coefficients"].flatten(0, 1).double() @ stored["bases"].flatten(1).double()
    # Eckart and Young: the least error of rank ten is what the other singular values make.
    least = torch.linalg.svdvals(small)[10:].square().sum()
    torch.testing.assert_close((small - found).square().sum(), least, rtol=1e-5, atol=0)


@given(seed=seeds, factor=st.sampled_from([1, 2, 4]))
def test_cells_of_a_stored_image_are_smaller_images_of_one_class(seed: int, factor: int) -> None:
    images, form = real(2 * factor**2, seed)[0], MultiFormation(factor)
    stored = form.encode(images, 2)
    assert stored["images"].shape == (2, *SHAPE)
    side = 8 // factor
    cells = [
        stored["images"][c, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
        for c in range(2)
        for i in range(factor)
        for j in range(factor)
    ]
    for cell, image, decoded in zip(cells, images, form.decode(stored), strict=True):
        if factor == 1:
            assert torch.equal(decoded, image)
            continue
        torch.testing.assert_close(cell, torch.nn.functional.avg_pool2d(image, factor))
        up = torch.nn.functional.interpolate(cell[None], size=8, mode="bilinear")[0]
        torch.testing.assert_close(decoded, up)


@given(seed=seeds)
def test_images_that_are_as_the_decoder_makes_them_are_not_changed_by_storing(seed: int) -> None:
    for form in (Pixels(), Patches(4)):
        images = real(8, seed)[0]
        assert torch.equal(form.decode(form.encode(images, CLASSES)), images)


@given(name=each_form, seed=seeds)
def test_projection_gives_every_decoded_image_unit_norm_and_keeps_its_direction(
    name: str, seed: int
) -> None:
    dataset, outer = made(name, seed)
    before = dataset.images(outer).detach().flatten(1)
    projecting, projected = made(name, seed, projection="every_step")
    for _ in range(2):
        images = projecting.images(projected).detach().flatten(1)
        torch.testing.assert_close(images.norm(dim=1), torch.ones(len(images)))
        if name != "Patches":  # whose patches are scaled one by one
            torch.testing.assert_close(
                images, before / before.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
            )
        with torch.no_grad():
            for value in projecting.stored(projected).values():
                value.mul_(1.5)
        projecting.constrain_(projected)


# Runs.


def test_multi_formation_of_one_is_pixels_to_the_bit(tmp_path: Path) -> None:
    changes = {
        "SyntheticDataset__start": "real",
        "SyntheticDataset__images_per_class": 2,
        "SyntheticDataset__batch_per_class": 1,
        "Evaluator__full_data_networks": 0,
    }
    for name, own in (("Pixels", {}), ("MultiFormation", {"MultiFormation__factor": 1})):
        words = {**changes, **own, "SyntheticDataset__parameterisation": f"@{name}()"}
        assert train.main(arguments(tmp_path / name, **words)) == 0
    one, other = (
        DistilledSet.load(tmp_path / name / "distilled.safetensors")
        for name in ("Pixels", "MultiFormation")
    )
    assert torch.equal(one.images, other.images)
    first, second = (results_of(tmp_path / name) for name in ("Pixels", "MultiFormation"))
    assert first["accuracy"] == second["accuracy"]
    assert first["stored_floats"] == second["stored_floats"] == 20 * 64


def test_a_coded_set_is_distilled_and_judged_by_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(
        tmp_path / "run",
        SyntheticDataset__parameterisation="@Bases()",
        SyntheticDataset__start="real",
        SyntheticDataset__batch_per_class=2,
        SyntheticDataset__learn_labels=True,
        Bases__number=8,
        Evaluator__full_data_networks=0,
    )
    assert train.main(words) == 0
    # Of 640 floats 128 are in bases; an image takes 8 coefficients and 10 entries of a label.
    assert "2 images per class, 488 stored floats" in capsys.readouterr().out
    found = DistilledSet.load(tmp_path / "run" / "distilled.safetensors")
    assert found.images.shape == (20, 1, 8, 8)
    assert {name: tuple(value.shape) for name, value in found.stored.items()} == {
        "bases": (8, 1, 4, 4),
        "coefficients": (10, 2, 8),
    }
    assert torch.equal(Bases(8).decode(found.stored), found.images)
    assert found.provenance["parameterisation"] == "Bases(number=8, factor=2)"
    before = results_of(tmp_path / "run")
    assert (before["images_per_class"], before["stored_floats"]) == (2, 488)
    path = tmp_path / "again.json"
    assert evaluate.main([str(tmp_path / "run"), "--only=distilled", f"--json={path}"]) == 0
    assert "2 images per class, 488 stored floats" in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again["accuracy"]["distilled"] == before["accuracy"]["distilled"]


# What is refused.


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"parameterisation": "@Bases()"}, "Bases with number=36: .* 16 values"),
        ({"parameterisation": "@MultiFormation()", "batch_per_class": 5}, "only 4 images"),
        ({"parameterisation": "@Bases"}, r"write for example|@Bases\(\) with \(\)"),
        ({"parameterisation": "@Pixels()", "patches_per_side": 2}, "patches_per_side=2"),
    ],
)
def test_what_cannot_be_stored_is_one_line(
    lines: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {f"SyntheticDataset__{name}": value for name, value in lines.items()}
    assert train.main(arguments(tmp_path / "run", **changes)) == 2
    assert re.search(message, one_error(capsys))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (MultiFormation(3), "MultiFormation with factor=3: images are 8×8"),
        (Bases(4, 3), "Bases with factor=3: images are 8×8"),
        (Bases(31), "number=31: beside them images_per_class=2 has room for 0 coded images"),
        (Patches(3), "patches_per_side=3: images of 8×8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(form: Parameterisation, message: str) -> None:
    dataset = SyntheticDataset(2, parameterisation=form)
    with pytest.raises(ConfigurationError, match=message):
        dataset.create(*real(), CLASSES, seeded(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiFormation(0), "factor=0"),
        (lambda: Bases(0), "number=0"),
        (lambda: Bases(4, 1.5), "factor=1.5"),
        (lambda: Bases(4, 2, 0.0), "coefficient_lr=0.0"),
        (lambda: Patches(0), "patches_per_side=0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
