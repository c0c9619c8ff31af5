"""Evaluation: what is trained on what, and which images decide what."""

import io
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from problems import seeded
from torch import Tensor, nn

from bilevel import Key
from dd.augmentation import NoAugmentation
from dd.data import Standardize
from dd.data.prepared import PreparedData
from dd.evaluation.accuracy import Accuracy, accuracy, confusion
from dd.evaluation.confusion_picture import confusion_picture
from dd.evaluation.evaluator import Evaluator

CLASSES = 3
KEY = Key(0)


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of three well separated classes: noise around one bright row each."""
    labels = torch.arange(count) % CLASSES
    images = 0.3 * torch.randn(count, 1, 3, 3, generator=seeded(seed))
    images[torch.arange(count), 0, labels] += 2.0
    return images, labels


def data(**changes: Tensor) -> PreparedData:
    """Sixty training, thirty validation and thirty test images, with some parts replaced."""
    parts = {
        f"{part}_{kind}": value
        for part, count, seed in (("train", 60, 1), ("validation", 30, 2), ("test", 30, 3))
        for kind, value in zip(("images", "labels"), examples(count, seed), strict=True)
    }
    return PreparedData(
        transform=Standardize([0.0], [1.0]),
        class_names=("a", "b", "c"),
        **{**parts, **changes},  # type: ignore[arg-type]
    )


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def evaluator(**arguments: Any) -> Evaluator:
    defaults: dict[str, Any] = {
        "networks": 2,
        "steps": (1, 60),
        "lr": 2e-2,
        "full_data_networks": 1,
        "full_data_steps": (40,),
        "augmentation": NoAugmentation(),
    }
    return Evaluator(**{**defaults, **arguments})


class Noted(nn.Module):
    """A network that notes what it is trained on, and how many images it is judged on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.trained_on: list[Tensor] = []
        self.judged_on: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.trained_on.append(images)
        else:
            self.judged_on.append(len(images))
        logits: Tensor = self.network(images)
        return logits


# How good.


def test_a_good_set_is_well_above_chance_and_shuffled_labels_are_not(network: nn.Module) -> None:
    images, labels = examples(6, seed=4)
    good = evaluator().distilled(images, labels, network, data(), KEY)
    assert good.mean > 0.9
    assert good.steps == 60
    bad = evaluator().distilled(images, (labels + 1) % CLASSES, network, data(), KEY)
    assert bad.mean < 0.4


def test_soft_labels_are_trained_on(network: nn.Module) -> None:
    images, labels = examples(6, seed=4)
    soft = nn.functional.one_hot(labels, CLASSES).float()
    hard = evaluator().distilled(images, labels, network, data(), KEY)
    assert evaluator().distilled(images, soft, network, data(), KEY) == hard
    wrong = evaluator().distilled(images, soft.roll(1, dims=1), network, data(), KEY)
    assert wrong.mean < 0.4


def test_the_other_sets_are_as_good_on_an_easy_problem(network: nn.Module) -> None:
    full = evaluator().full_data(network, data(), KEY)
    assert full is not None
    assert full.mean > 0.9
    assert evaluator().random_real(2, network, data(), KEY).mean > 0.9
    images, labels = examples(6, seed=4)
    assert evaluator(validation_steps=60).validation(images, labels, network, data(), KEY) > 0.9


def test_small_batches_of_a_set_are_enough(network: nn.Module) -> None:
    result = evaluator(batch_size=4).distilled(*examples(30, seed=4), network, data(), KEY)
    assert result.mean > 0.9


def test_accuracy_is_exact(network: nn.Module) -> None:
    """More images than are judged at a time, of which a known number is right."""
    images, labels = examples(1203, seed=5)
    params = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    params["3.bias"] = torch.tensor([0.0, 1.0, 0.0])
    found = accuracy(network, params, images, labels)
    assert found == int((labels == 1).sum()) / 1203


# Which images decide.


def test_steps_are_chosen_on_validation_even_where_the_test_set_disagrees(
    network: nn.Module,
) -> None:
    """Test labels are all wrong, so training longer helps validation and hurts the test."""
    test_images, test_labels = examples(30, seed=3)
    contrary = data(test_images=test_images, test_labels=(test_labels + 1) % CLASSES)
    images, labels = examples(6, seed=4)
    result = evaluator().distilled(images, labels, network, contrary, KEY)
    assert result.steps == 60
    assert result.mean < 0.1


def test_validation_can_choose_the_early_stage(network: nn.Module) -> None:
    validation_images, validation_labels = examples(30, seed=2)
    contrary = data(
        validation_images=validation_images, validation_labels=(validation_labels + 1) % CLASSES
    )
    images, labels = examples(6, seed=4)
    result = evaluator().distilled(images, labels, network, contrary, KEY)
    assert result.steps == 1
    assert result == evaluator(steps=[1]).distilled(images, labels, network, contrary, KEY)
    assert result != evaluator(steps=[60]).distilled(images, labels, network, contrary, KEY)


def test_the_test_set_is_seen_once_by_each_network_after_every_choice(network: nn.Module) -> None:
    noted = Noted(network)
    test_images, test_labels = examples(27, seed=3)
    parts = data(test_images=test_images, test_labels=test_labels)
    images, labels = examples(6, seed=4)
    evaluator(networks=3, steps=(1, 2, 3, 4)).distilled(images, labels, noted, parts, KEY)
    validation, test = 30, 27
    assert noted.judged_on == [validation] * 12 + [test] * 3
    noted.judged_on.clear()
    evaluator(validation_networks=3).validation(images, labels, noted, parts, KEY)
    assert noted.judged_on == [validation] * 3


# What is trained on.


def test_random_real_draws_as_many_of_each_class_and_others_for_each_network(
    network: nn.Module,
) -> None:
    noted, parts = Noted(network), data()
    train_rows = {
        tuple(image.flatten().tolist()): int(label)
        for image, label in zip(parts.train_images, parts.train_labels, strict=True)
    }
    evaluator(networks=4, steps=(1,)).random_real(3, noted, parts, KEY)
    assert len(noted.trained_on) == 4
    drawn = []
    for images in noted.trained_on:
        rows = [tuple(image.flatten().tolist()) for image in images]
        assert [train_rows[row] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert len(set(rows)) == 9
        drawn.append(frozenset(rows))
    assert len(set(drawn)) == 4


def test_a_class_with_fewer_random_images_than_asked_gives_all_of_them(network: nn.Module) -> None:
    noted, parts = Noted(network), data()
    evaluator(networks=1, steps=(1,)).random_real(21, noted, parts, KEY)
    assert [len(images) for images in noted.trained_on] == [60]


def test_full_data_is_all_of_the_training_part(network: nn.Module) -> None:
    noted, parts = Noted(network), data()
    evaluator(full_data_networks=2, full_data_steps=(1,)).full_data(noted, parts, KEY)
    assert len(noted.trained_on) == 2
    assert all(torch.equal(images, parts.train_images) for images in noted.trained_on)


def test_full_data_can_be_left_out(network: nn.Module) -> None:
    assert evaluator(full_data_networks=0).full_data(network, data(), KEY) is None


def test_evaluation_leaves_the_set_and_the_network_as_they_were(network: nn.Module) -> None:
    images, labels = examples(6, seed=4)
    images.requires_grad_()
    before = images.detach().clone()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    evaluator().distilled(images, labels, network, data(), KEY)
    assert images.grad is None
    assert torch.equal(images, before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


# Randomness.


def test_the_same_key_gives_the_same_numbers_and_another_key_others(network: nn.Module) -> None:
    hard = data(train_images=examples(60, 1)[0] / 8, test_images=examples(30, 3)[0] / 8)
    some = evaluator(networks=4, steps=(5, 9), batch_size=4)

    def measured(key: Key) -> list[Accuracy | float | None]:
        images, labels = examples(6, seed=4)
        return [
            some.distilled(images, labels, network, hard, key),
            some.random_real(2, network, hard, key),
            some.full_data(network, hard, key),
            some.validation(images, labels, network, hard, key),
        ]

    torch.manual_seed(1)
    first = measured(KEY)
    torch.manual_seed(2)
    assert measured(KEY) == first
    assert measured(Key(1)) != first


def test_networks_are_independent(network: nn.Module) -> None:
    images, labels = examples(6, seed=4)
    result = evaluator(networks=6, steps=(1,)).distilled(images, labels, network, data(), KEY)
    assert len(set(result.values)) > 2


# The numbers that are reported.


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_mean_and_sample_standard_deviation(values: list[float]) -> None:
    found = Accuracy(tuple(values), steps=300)
    tensor = torch.tensor(values, dtype=torch.float64)
    assert found.mean == pytest.approx(float(tensor.mean()))
    assert found.std == pytest.approx(float(tensor.std(correction=1)), abs=1e-12)
    assert found.std == statistics.stdev(values)
    assert found.as_dict() == {
        "mean": found.mean,
        "std": found.std,
        "networks": len(values),
        "values": values,
        "steps": 300,
    }


def test_one_network_has_no_spread() -> None:
    assert Accuracy((0.7,), steps=1).std == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": 0}, "networks=0"),
        ({"networks": "2"}, "networks='2'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"full_data_networks": -1}, "full_data_networks=-1"),
        ({"validation_networks": 0}, "validation_networks=0"),
        ({"validation_steps": 0.5}, "validation_steps=0.5"),
        ({"steps": []}, r"steps=\[\]"),
        ({"steps": 300}, "steps=300"),
        ({"steps": [0]}, "steps=0"),
        ({"full_data_steps": ["5"]}, "full_data_steps='5'"),
        ({"lr": 0}, "lr=0"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"augmentation": NoAugmentation}, "augmentation"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator(**arguments)


def test_steps_may_come_in_any_order_and_more_than_once(network: nn.Module) -> None:
    images, labels = examples(6, seed=4)
    tidy = evaluator(steps=(1, 60)).distilled(images, labels, network, data(), KEY)
    assert evaluator(steps=[60, 1]).distilled(images, labels, network, data(), KEY) == tidy
    assert evaluator(steps=[60, 1, 60]).distilled(images, labels, network, data(), KEY) == tidy


def test_what_is_taken_for_what_is_counted() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.randn(23, 1, 2, 2), torch.randint(0, 2, (23,))
    params = dict(network.named_parameters())
    counts = confusion(network, params, images, labels, 3, chunk=5)
    predicted = network(images).argmax(1)
    expected = [[int(((labels == i) & (predicted == j)).sum()) for j in range(3)] for i in range(3)]
    assert counts.tolist() == expected
    right = int(counts.diagonal().sum()) / 23
    assert right == accuracy(network, params, images, labels, chunk=5)
    found = Accuracy((right,), 1, counts)
    assert found.per_class[2] is None
    shares = [0 if of is None else of for of in found.per_class]
    assert sum(a * n for a, n in zip(shares, counts.sum(1).tolist(), strict=True)) / 23 == (
        pytest.approx(right)
    )


@pytest.mark.parametrize(("classes", "names"), [(3, "cat"), (40, "x" * 80), (7, "собака 犬")])
def test_the_picture_of_it_has_a_cell_for_every_pair(classes: int, names: str) -> None:
    counts = torch.eye(classes, dtype=torch.int64)
    drawn = Image.open(io.BytesIO(confusion_picture(counts, [names] * classes))).convert("RGB")
    assert drawn.size[0] == drawn.size[1] > 20 * 3
    dark = sum(drawn.getpixel((x, x)) == (8, 48, 107) for x in range(drawn.size[0]))
    assert dark > drawn.size[0] / 4
