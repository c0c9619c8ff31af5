"""The pictures of a run with the nearest real image beside every distilled one."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import distil, experiment, shown_in

from dd.distillation.gallery import beside
from dd.distillation.prototypes import nearest_real
from dd.evaluation.distilled_set import DistilledSet


@pytest.mark.parametrize("transform", ["@standardize", "@kip_whitening"])
def test_the_nearest_is_what_comparing_with_every_training_image_of_the_class_finds(
    transform: str,
) -> None:
    made = experiment(Experiment__transform=transform)
    data = made.prepare()
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).repeat_interleave(2)
    distilled = DistilledSet(images, labels, data.transform, data.class_names, {})
    found = nearest_real(distilled, data)
    assert found.shape == images.shape
    for index, image in enumerate(distilled.pixels()):
        rows = (data.train_labels == labels[index]).nonzero().flatten()
        real = distilled.inverse(data.train_images[rows])
        distances = (real - image).flatten(1).norm(dim=1)
        (chosen,) = [row for row, each in enumerate(real) if torch.equal(each, found[index])]
        assert float(distances[chosen]) == pytest.approx(float(distances.min()), rel=1e-5)


def test_a_run_shows_them_if_it_is_asked_to(tmp_path: Path) -> None:
    made = experiment(Distiller__nearest_real=True, Distiller__outer_steps=1)
    distil(made, made.prepare(), tmp_path)
    with Image.open(tmp_path / "distilled.png") as picture:
        assert picture.size[0] == 5 * (8 + (8 + 1 + 8) * 8) + 2
    (first, *_) = shown_in(tmp_path).Images("synthetic_images/stretched")
    assert (first.width, first.height) == picture.size


def test_without_real_images_a_picture_is_as_it_was() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert beside(images, None) is images
    both = beside(images, 1 - images)
    assert both.shape == (2, 3, 4, 9)
    assert torch.equal(both[..., :4], images)
    assert torch.equal(both[..., 5:], 1 - images)
