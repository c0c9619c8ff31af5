"""Distillation as a nested problem: its hypergradient is the one autograd gives, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from bilevel.estimators import Adjoint, Estimator, Reverse
from dd.augmentation import DSA, Augmentation, FlipOrRotate, NoAugmentation
from dd.networks import ConvNet
from dd.objectives.real_images import MetaLoss
from dd.synthetic.dataset import SyntheticDataset

Outer = dict[str, Tensor]

CPU = torch.device("cpu")
CLASSES = 3
EXACT = 1e-9
AUGMENTATIONS: dict[str, Augmentation] = {
    "none": NoAugmentation(),
    "flip_or_rotate": FlipOrRotate(),
    "dsa": DSA(),
}
each_augmentation = pytest.mark.parametrize(
    "augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS
)
hard_or_learned = pytest.mark.parametrize("learn_labels", [False, True], ids=["hard", "learned"])
seeds = st.integers(0, 2**31)


def network(channels: int = 3) -> nn.Module:
    return ConvNet(CLASSES, channels, image_size=8, depth=1, width=3).double()


def distillation(
    augmentation: Augmentation, learn_labels: bool, classes_per_step: int | None = 2
) -> tuple[MetaLoss, Outer]:
    """A problem with mini-batches, and outer variables for it."""
    synthetic = SyntheticDataset(
        images_per_class=2,
        learn_labels=learn_labels,
        classes_per_step=classes_per_step,
        batch_per_class=1,
    )
    images, labels = real_batch()
    outer = synthetic.create(images, labels, CLASSES, seeded(3))
    double = {name: value.detach().double().requires_grad_() for name, value in outer.items()}
    return MetaLoss(network(), synthetic, augmentation, CPU), double


def real_batch(count: int = 7) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=seeded(11))
    return images, torch.arange(count) % CLASSES


def solve(
    problem: MetaLoss,
    outer: Outer,
    *,
    seed: int,
    estimator: Estimator,
    batch: object = None,
    truncation: bilevel.truncation.Truncation | None = None,
) -> bilevel.HypergradientResult:
    hypergradient = bilevel.Hypergradient(
        problem,
        bilevel.optim.adam(1e-2, eps_root=1e-8),
        steps=5,
        truncation=truncation,
        estimator=estimator,
    )
    return hypergradient(outer, real_batch() if batch is None else batch, seeded(seed))


def assert_same(first: Outer, second: Outer) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=EXACT, atol=EXACT)


@hard_or_learned
@each_augmentation
@settings(max_examples=4)
@given(seed=seeds, window=st.integers(1, 5))
def test_adjoint_equals_reverse(
    augmentation: Augmentation, learn_labels: bool, seed: int, window: int
) -> None:
    problem, outer = distillation(augmentation, learn_labels)
    truncation = bilevel.truncation.Last(window)
    adjoint, reverse = (
        solve(problem, outer, seed=seed, estimator=each, truncation=truncation)
        for each in (Adjoint(), Reverse())
    )
    assert_same(adjoint.grads, reverse.grads)
    torch.testing.assert_close(adjoint.loss, reverse.loss, rtol=EXACT, atol=EXACT)
    assert float(adjoint.grads["images"].abs().max()) > 1e-6


@hard_or_learned
@each_augmentation
@settings(max_examples=4)
@given(seed=seeds, window=st.integers(1, 4))
def test_adjoint_equals_a_hand_written_unroll(
    augmentation: Augmentation, learn_labels: bool, seed: int, window: int
) -> None:
    """Four steps of gradient descent, the last `window` of them with a graph."""
    problem, outer = distillation(augmentation, learn_labels)
    steps, lr = 4, 0.1
    images, labels = real_batch()
    result = bilevel.Hypergradient(
        problem, bilevel.optim.sgd(lr), steps, bilevel.truncation.Last(window), Adjoint()
    )(outer, (images, labels), seeded(seed))

    key = bilevel.Key.draw(seeded(seed))
    net = network()
    params = bilevel.fresh_parameters(net, key.generator("init"))
    params = {name: value.requires_grad_() for name, value in params.items()}
    for step in range(steps):
        if step == steps - window:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        generator = key.generator("inner_batch", step)
        batch, targets = problem.synthetic.batch(outer, generator)
        logits = functional_call(net, params, (augmentation(batch, generator),))
        loss = F.cross_entropy(logits, targets)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {
            name: value - lr * gradient
            for (name, value), gradient in zip(params.items(), gradients, strict=True)
        }
    loss = F.cross_entropy(functional_call(net, params, (images,)), labels)
    expected = torch.autograd.grad(loss, list(outer.values()), materialize_grads=True)
    assert_same(result.grads, dict(zip(outer, expected, strict=True)))
    torch.testing.assert_close(result.loss, loss.detach(), rtol=EXACT, atol=EXACT)


@each_augmentation
def test_the_same_seed_gives_the_same_bits(augmentation: Augmentation) -> None:
    problem, outer = distillation(augmentation, learn_labels=True)
    first, again, other = (
        solve(problem, outer, seed=seed, estimator=Adjoint()) for seed in (5, 5, 6)
    )
    assert torch.equal(first.loss, again.loss)
    for name in outer:
        assert torch.equal(first.grads[name], again.grads[name])
        assert not torch.equal(first.grads[name], other.grads[name])


@given(seed=seeds)
def test_an_inner_batch_is_a_pure_function_of_its_generator(seed: int) -> None:
    problem, outer = distillation(FlipOrRotate(), learn_labels=True)
    first, again = (problem.inner_batch(outer, 0, generator=seeded(seed)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_every_initialisation_is_fresh_and_the_template_stays_as_it_is() -> None:
    problem, outer = distillation(NoAugmentation(), learn_labels=False)
    before = {name: value.clone() for name, value in problem.network.state_dict().items()}
    first, again, other = (problem.init(outer, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first["classifier.weight"], again["classifier.weight"])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    solve(problem, outer, seed=0, estimator=Adjoint())
    for name, value in problem.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_accuracy_is_the_fraction_classified_right() -> None:
    problem, outer = distillation(NoAugmentation(), learn_labels=False)
    images, _ = real_batch(6)
    params = problem.init(outer, generator=seeded(0))
    predicted = functional_call(problem.network, params, (images,)).argmax(dim=1)
    wrong = torch.tensor([True, False, False, True, False, False])
    labels = torch.where(wrong, (predicted + 1) % CLASSES, predicted)
    _, metrics = problem.outer_loss(params, outer, (images, labels))
    assert float(metrics["accuracy"]) == pytest.approx(4 / 6)
    result = solve(problem, outer, seed=0, estimator=Adjoint())
    assert 0 <= float(result.metrics["accuracy"]) <= 1


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=seeds)
@settings(max_examples=8)
def test_micro_batches_equal_the_whole_batch(sizes: list[int], seed: int) -> None:
    problem, outer = distillation(DSA(), learn_labels=True)
    images, labels = real_batch(sum(sizes))
    pieces = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    micro = bilevel.MicroBatches(pieces, [size / sum(sizes) for size in sizes])
    whole, parts = (
        solve(problem, outer, seed=seed, estimator=Adjoint(), batch=batch)
        for batch in ((images, labels), micro)
    )
    assert_same(parts.grads, whole.grads)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.metrics["accuracy"], whole.metrics["accuracy"])
