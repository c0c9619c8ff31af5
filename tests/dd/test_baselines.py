"""Real images chosen without distilling: what the choices promise, and the command's table."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from tiny_runs import arguments, one_error
from torch import Tensor, nn

from dd import evaluate, train
from dd.evaluation.baselines import Teacher, herding, k_center
from dd.networks import ConvNet

seeds = st.integers(0, 2**31)


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=seeded(seed))


def radius(features: Tensor, chosen: Tensor) -> float:
    return float(torch.cdist(features, features[chosen]).min(1).values.max())


@given(seed=seeds, count=st.integers(1, 4))
def test_k_center_is_within_twice_the_least_radius(seed: int, count: int) -> None:
    features = points(9, seed)
    chosen = k_center(features, count)
    assert len(chosen.unique()) == count
    least = min(radius(features, torch.tensor(each)) for each in combinations(range(9), count))
    assert radius(features, chosen) <= 2 * least + 1e-9


@given(seed=seeds, count=st.integers(1, 9))
def test_herding_takes_the_best_next_one_without_repeating(seed: int, count: int) -> None:
    features = points(9, seed)
    chosen = herding(features, count).tolist()
    assert len(set(chosen)) == count
    for k in range(count):
        means = {
            i: float((features[[*chosen[:k], i]].mean(0) - features.mean(0)).norm())
            for i in range(9)
            if i not in chosen[:k]
        }
        assert means[chosen[k]] <= min(means.values()) + 1e-12


@pytest.mark.parametrize("choose", [herding, k_center])
def test_equal_images_are_not_chosen_twice(choose: object) -> None:
    assert callable(choose)
    assert sorted(choose(torch.zeros(4, 2), 4).tolist()) == [0, 1, 2, 3]


def test_a_teachers_features_and_predictions_are_those_of_its_network() -> None:
    network = ConvNet(num_classes=4, channels=1, image_size=8, depth=1, width=3)
    images = torch.randn(5, 1, 8, 8, generator=seeded(0))
    features, predictions = Teacher(network, dict(network.named_parameters()))(images)
    (last,) = [module for module in network.modules() if isinstance(module, nn.Linear)]
    torch.testing.assert_close(last(features), network(images))
    torch.testing.assert_close(predictions, network(images).softmax(1))


@pytest.mark.parametrize("learn_labels", [True, False])
def test_the_table_has_hard_and_soft_labels_of_every_choice(
    learn_labels: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = arguments(
        folder,
        SyntheticDataset__learn_labels=learn_labels,
        Evaluator__full_data_networks=0,
        Evaluator__teacher_steps=20,
    )
    assert train.main(words) == 0
    capsys.readouterr()
    assert evaluate.main([str(folder), "--baselines=random,herding,k_center,el2n"]) == 0
    path = folder / "results-baselines-el2n+herding+k_center+random.json"
    found, shown = json.loads(path.read_text()), capsys.readouterr().out
    chosen, accuracy = found["baselines"], found["accuracy"]
    own = "soft_labels" if learn_labels else "hard_labels"
    assert chosen["distilled"][own]["values"] == accuracy["distilled"]["values"]
    assert chosen["random"]["hard_labels"]["values"] == accuracy["random_real"]["values"]
    for name in ("random", "herding", "k_center", "el2n"):
        assert set(chosen[name]) == {"hard_labels", "soft_labels"}
        assert f"\n{name.replace('_', ' ')} " in shown
    assert ("random_with_the_distilled_labels" in chosen) == learn_labels
    assert ("\nrandom with the distilled labels" in shown) == learn_labels


def test_a_choice_that_does_not_exist_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.gin").write_text("")
    assert evaluate.main([str(tmp_path), "--baselines=random,hrding"]) == 2
    assert "--baselines=hrding: there are random, herding" in one_error(capsys)
