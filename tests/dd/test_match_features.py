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
from dd.augmentation import Augmentation, FlipOrRotate, NoAugmentation
from dd.distillation.loop import CHECKPOINT
from dd.networks import ConvNet, embedded
from dd.objectives import CharacteristicFunctions, MeanFeatures
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


def matching(network: nn.Module, synthetic: SyntheticDataset, augmentation: Augmentation):
    return FeatureMatching(network, synthetic, augmentation, torch.device("cpu"), MeanFeatures())


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
    problem = matching(network, synthetic, NoAugmentation())
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


@given(
    seed=seeds,
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3),
    amplitude=st.floats(0, 1),
    bandwidth=st.floats(0.1, 3),
)
@settings(max_examples=20)
def test_characteristic_functions_are_compared_by_the_formula(
    seed: int, sizes: list[tuple[int, int]], amplitude: float, bandwidth: float
) -> None:
    """Against complex numbers, class by class; and with α = 1/2 the distance of the two."""
    draw, width, frequencies = seeded(seed), 3, 64
    real_labels, labels = (
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
        for counts in zip(*sizes, strict=True)
    )
    real = torch.randn(len(real_labels), width, dtype=torch.float64, generator=draw)
    found = torch.randn(len(labels), width, dtype=torch.float64, generator=draw)
    spread = float((real - real.mean(0)).square().sum(1).mean().sqrt()) or 1.0
    omega = torch.randn(width, frequencies, generator=seeded(7)).double() * bandwidth / spread
    expected = 0.0
    for label in range(len(sizes)):
        x = torch.exp(1j * (real[real_labels == label] @ omega)).mean(0)
        s = torch.exp(1j * (found[labels == label] @ omega)).mean(0)
        phases = 2 * x.abs() * s.abs() * (1 - torch.cos(x.angle() - s.angle()))
        squared = amplitude * (x.abs() - s.abs()) ** 2 + (1 - amplitude) * phases
        expected += float(squared.clamp_min(torch.finfo(torch.float64).eps).sqrt().mean())
    members = [
        (torch.arange(len(sizes))[:, None] == each).double() for each in (real_labels, labels)
    ]
    compare = CharacteristicFunctions(frequencies, amplitude, bandwidth)
    loss = compare(real, members[0], found, members[1], seed=7)
    # Where an amplitude is 0, rounding goes under a root.
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert float(compare(real, members[0], real, members[0], seed=7)) < 1e-6


def test_characteristic_functions_see_more_than_means() -> None:
    """Two sets of one mean, of which one is twice as wide."""
    real = torch.randn(200, 4, generator=seeded(0))
    real = real - real.mean(0)
    wider, members = 2 * real, torch.ones(1, 200)
    means, functions = (
        compare(real, members, wider, members, seed=0)
        for compare in (MeanFeatures(), CharacteristicFunctions())
    )
    assert float(means) < 1e-10
    assert float(functions) > 0.1


def test_the_hypergradient_is_the_derivative_of_the_loss_in_the_images_alone() -> None:
    form = MultiFormation(2)
    network, synthetic = conv_net(), SyntheticDataset(1, parameterisation=form)
    problem = matching(network, synthetic, FlipOrRotate())
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


@pytest.mark.parametrize("discrepancy", ["@MeanFeatures()", "@CharacteristicFunctions()"])
def test_the_command_matches_features(tmp_path: Path, discrepancy: str) -> None:
    words = arguments(
        tmp_path,
        MatchFeatures__discrepancy=discrepancy,
        **{**MATCHING, "Distiller__outer_steps": 40},
        SyntheticDataset__parameterisation="@MultiFormation()",
        Evaluator__steps=[60],
    )
    assert train.main(words) == 0
    assert results_of(tmp_path)["accuracy"]["distilled"]["mean"] > 0.2


def test_labels_are_not_learned() -> None:
    with pytest.raises(Exception, match="learn_labels=True: MatchFeatures"):
        experiment(**MATCHING, SyntheticDataset__learn_labels=True)
