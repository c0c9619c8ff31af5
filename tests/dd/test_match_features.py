"""Distribution matching: the loss against its formula, its derivative, and a run."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from tiny_runs import arguments, distil, experiment, results_of
from torch import Tensor, nn

import bilevel
from dd import train
from dd.augmentation import FlipOrRotate, NoAugmentation
from dd.distillation.loop import CHECKPOINT
from dd.networks import ConvNet, embedded
from dd.objectives.match_features import FeatureMatching
from dd.runtime.files import read_tensors
from dd.synthetic import MultiFormation, SyntheticDataset

CLASSES = 3
MATCHING = {
    "Distiller__objective": "@MatchFeatures()",
    "Distiller__truncation": "@Full()",
    "Distiller__inner_steps": 1,
    "MatchFeatures__real_per_class": 20,
    "Evaluator__full_data_networks": 0,
}
seeds = st.integers(0, 2**31)


def conv_net() -> ConvNet:
    return ConvNet(num_classes=CLASSES, channels=1, image_size=8, depth=1, width=4)


def batch(seed: int, classes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real images of the classes, five of each."""
    labels = classes.repeat_interleave(5)
    images = torch.randn(len(labels), 1, 8, 8, dtype=torch.float64, generator=seeded(seed))
    return images, labels, classes, torch.tensor(seed)


@given(seed=seeds, matched=st.permutations([0, 1, 2]), count=st.integers(1, 3))
@settings(max_examples=20)
def test_the_loss_is_the_formula(seed: int, matched: list[int], count: int) -> None:
    classes = torch.tensor(matched[:count])
    network, synthetic = conv_net(), SyntheticDataset(2)
    problem = FeatureMatching(network, synthetic, NoAugmentation(), torch.device("cpu"))
    images = torch.randn(2 * CLASSES, 1, 8, 8, dtype=torch.float64, generator=seeded(seed + 1))
    params = {
        name: value.double()
        for name, value in bilevel.fresh_parameters(network, seeded(seed)).items()
    }
    real, labels, _, _ = given = batch(seed, classes)
    expected = 0.0
    for label in classes.tolist():
        of_real = embedded(network, params, real[labels == label])[0].mean(0)
        of_synthetic = embedded(network, params, images[2 * label : 2 * label + 2])[0].mean(0)
        expected += float((of_real - of_synthetic).square().sum())
    assert float(problem.outer_loss(params, {"images": images}, given)) == pytest.approx(expected)


def test_the_hypergradient_is_the_derivative_of_the_loss_in_the_images_alone() -> None:
    form = MultiFormation(2)
    network, synthetic = conv_net(), SyntheticDataset(1, parameterisation=form)
    problem = FeatureMatching(network, synthetic, FlipOrRotate(), torch.device("cpu"))
    images = torch.randn(CLASSES, 1, 8, 8, generator=seeded(0)).requires_grad_()
    real, *rest = batch(1, torch.arange(CLASSES))
    given = (real.float(), *rest)
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.adam(1e-3), steps=1)
    result = hypergradient({"images": images}, given, seeded(3))
    params = {name: value.detach() for name, value in result.params.items()}
    loss = problem.outer_loss(params, {"images": images}, given)
    (expected,) = torch.autograd.grad(loss, images)
    torch.testing.assert_close(result.grads["images"], expected)
    assert float(expected.abs().max()) > 0


def test_what_is_embedded_is_what_the_last_layer_is_given() -> None:
    network = conv_net()
    images = torch.randn(5, 1, 8, 8, generator=seeded(0))
    features, logits = embedded(network, dict(network.named_parameters()), images)
    (last,) = [module for module in network.modules() if isinstance(module, nn.Linear)]
    torch.testing.assert_close(last(features), logits)
    assert torch.equal(logits, network(images))


def test_a_run_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    made = experiment(**MATCHING, MatchFeatures__classes_per_step=4)
    data = made.prepare()
    distil(made, data, tmp_path / "whole")
    for until in (2, None):
        distil(
            experiment(**MATCHING, MatchFeatures__classes_per_step=4),
            data,
            tmp_path / "parts",
            until,
        )
    whole, parts = (read_tensors(tmp_path / name / CHECKPOINT)[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_command_matches_features(tmp_path: Path) -> None:
    words = arguments(
        tmp_path,
        **{**MATCHING, "Distiller__outer_steps": 40},
        SyntheticDataset__parameterisation="@MultiFormation()",
        Evaluator__steps=[60],
    )
    assert train.main(words) == 0
    assert results_of(tmp_path)["accuracy"]["distilled"]["mean"] > 0.2


def test_labels_are_not_learned() -> None:
    with pytest.raises(Exception, match="learn_labels=True: MatchFeatures"):
        experiment(**MATCHING, SyntheticDataset__learn_labels=True)
