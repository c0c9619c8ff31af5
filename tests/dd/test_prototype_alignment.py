"""Alignment by class prototypes: its value and derivatives against loops and differences."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from bilevel.compiler import Compiler
from bilevel.estimators import Adjoint, Reverse
from dd.augmentation import NoAugmentation
from dd.networks import ConvNet
from dd.objectives.alignment import PrototypeAlignment
from dd.objectives.real_images import MetaLoss
from dd.synthetic.dataset import SyntheticDataset
from dd.synthetic.patches import split_patches

CLASSES = 3
ALL = torch.arange(CLASSES)
seeds = st.integers(0, 2**31)
Batch = tuple[Tensor, Tensor]


class SmoothNetwork(nn.Module):
    """A network without kinks, so that differences can be compared with derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.Tanh()
        )
        self.classifier = nn.Linear(4 * 16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))  # type: ignore[no-any-return]


def conv_net() -> nn.Module:
    return ConvNet(CLASSES, channels=2, image_size=8, depth=1, width=4).double()


def parameters(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    fresh = bilevel.fresh_parameters(network, seeded(seed))
    return {name: value.requires_grad_() for name, value in fresh.items()}


def batch(count: int, seed: int, classes: int = CLASSES) -> Batch:
    """Images of 8×8 and their classes, every one of which occurs if there is room."""
    generator = seeded(seed)
    images = torch.randn(count, 2, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.arange(count)[torch.randperm(count, generator=generator)] % classes


def by_hand(
    network: nn.Module,
    params: dict[str, Tensor],
    real: Batch,
    synthetic: Batch,
    n: int,
    aligned: Sequence[int] = range(CLASSES),
) -> tuple[float, float]:
    """(L·V, V) of features averaged over n×n patches, by loops over classes and patches."""
    weights = {k[len("features.") :]: v for k, v in params.items() if k.startswith("features.")}

    @torch.no_grad()
    def features(image: Tensor) -> list[Tensor]:
        (found,) = functional_call(network.features, weights, (image[None],))
        size = found.shape[1] // n
        return [
            found[:, row : row + size, column : column + size].mean((1, 2))
            for row in range(0, found.shape[1], size)
            for column in range(0, found.shape[1], size)
        ]

    made = [[features(image) for image in part[0]] for part in (real, synthetic)]
    distance = scatter = 0.0
    for place in range(n**2):
        everything = [feature[place] for part in made for feature in part]
        mean = torch.stack(everything).mean(0)
        scatter += sum(float(((each - mean) ** 2).sum()) for each in everything) / len(everything)
        for label in aligned:
            members, copies = (
                [feature[place] for feature, own in zip(part, labels, strict=True) if own == label]
                for part, labels in zip(made, (real[1], synthetic[1]), strict=True)
            )
            if members:
                difference = torch.stack(members).mean(0) - torch.stack(copies).mean(0)
                distance += len(members) / len(real[1]) * float((difference**2).sum())
    return distance, scatter


@settings(max_examples=15)
@given(
    n=st.sampled_from([1, 2, 4]),
    real=st.integers(1, 6),
    copies=st.integers(1, 2),
    weight=st.floats(0.1, 10),
    parts_wanted=st.sampled_from([("global",), ("global", "local"), ("local",)]),
    seed=seeds,
)
def test_the_value_is_that_of_loops_over_classes_and_patches(
    n: int, real: int, copies: int, weight: float, parts_wanted: tuple[str, ...], seed: int
) -> None:
    assume(n > 1 or "global" in parts_wanted)
    network = conv_net()
    params = parameters(network, seed)
    given_real, synthetic = batch(real, seed), batch(copies * CLASSES, seed + 1)
    alignment = PrototypeAlignment(weight, parts=parts_wanted)
    value, parts = alignment(network, params, given_real, synthetic, ALL, CLASSES, n)
    sizes = {"global": 1} if n == 1 else {"global": 1, "local": n}
    wanted = {f"alignment_{part}": sizes[part] for part in parts_wanted if part in sizes}
    assert set(parts) == set(wanted)
    for name, patches in wanted.items():
        distance, scatter = by_hand(network, params, given_real, synthetic, patches)
        assert float(parts[name]) == pytest.approx(distance / scatter, rel=1e-9)
    assert float(value.detach()) == pytest.approx(weight * sum(float(v) for v in parts.values()))


@settings(max_examples=10)
@given(n=st.sampled_from([1, 2]), count=st.integers(1, CLASSES), seed=seeds)
def test_some_classes_make_the_term_of_all_on_average(n: int, count: int, seed: int) -> None:
    """But for the unit, which is that of the images at hand."""
    network, synthetic = conv_net(), SyntheticDataset(images_per_class=2, patches_per_side=n)
    params, real = parameters(network, seed), batch(7, seed)
    outer = {"images": split_patches(batch(2 * CLASSES, seed + 1)[0], n)}

    def term(classes: tuple[int, ...]) -> float:
        aligned = torch.tensor(classes)
        few = synthetic.of_classes(outer, aligned)
        _, parts = PrototypeAlignment()(network, params, real, few, aligned, CLASSES, n)
        distance, scatter = by_hand(network, params, real, few, n, classes)
        found = float(list(parts.values())[-1])
        assert found == pytest.approx(distance / scatter * CLASSES / count, rel=1e-9)
        return found * scatter

    drawn = [term(each) for each in itertools.permutations(range(CLASSES), count)]
    everything = synthetic.images(outer), synthetic.classes(outer)
    whole, _ = by_hand(network, params, real, everything, n)
    assert sum(drawn) / len(drawn) == pytest.approx(whole, rel=1e-9)


@settings(max_examples=10)
@given(n=st.sampled_from([1, 2, 4]), seed=seeds)
def test_the_derivative_is_that_of_central_differences_at_constant_unit(n: int, seed: int) -> None:
    network = SmoothNetwork().double()
    params = parameters(network, seed)
    real, (images, classes) = batch(5, seed), batch(2 * CLASSES, seed + 1)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=seeded(seed + 2))
    images = images.requires_grad_()
    value, _ = PrototypeAlignment(3.0)(network, params, real, (images, classes), ALL, CLASSES, n)
    (gradient,) = torch.autograd.grad(value, images)
    expected, step = 0.0, 1e-5
    for patches in {1, n}:
        ahead, behind = (
            by_hand(network, params, real, (images + sign * step * direction, classes), patches)[0]
            for sign in (1, -1)
        )
        unit = by_hand(network, params, real, (images, classes), patches)[1]
        expected += 3.0 * (ahead - behind) / (2 * step) / unit
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_a_layer_inside_is_taken_as_the_network_runs() -> None:
    """Not fed with the images themselves: its value is that of the layers up to it."""
    network = SmoothNetwork().double()
    params = parameters(network)
    up_to = SmoothNetwork().double()
    up_to.features = network.features[:3]
    up_to.classifier = nn.Linear(3 * 16, CLASSES).double()
    first = {name: value for name, value in params.items() if name.startswith("features.0.")}
    shared = {**dict(up_to.named_parameters()), **first}
    real, synthetic = batch(5, 0), batch(CLASSES, 1)
    inside = PrototypeAlignment(layer="features.2")
    inside.check(SmoothNetwork(), (2, 8, 8), 2)
    found, _ = inside(network, params, real, synthetic, ALL, CLASSES, 2)
    expected, _ = PrototypeAlignment()(up_to, shared, real, synthetic, ALL, CLASSES, 2)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_a_layer_that_the_network_does_not_run_is_refused() -> None:
    network = conv_net()
    network.unused = nn.Conv2d(2, 2, 1).double()
    with pytest.raises(ValueError, match=r"layer='unused': .* no use of it"):
        PrototypeAlignment(layer="unused").check(network.float(), (2, 8, 8), 2)


@given(
    n=st.sampled_from([1, 2]),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    scale=st.floats(0.1, 10),
)
@settings(max_examples=10)
def test_micro_batches_have_the_derivative_of_the_whole_but_for_their_unit(
    n: int, sizes: list[int], scale: float
) -> None:
    network = conv_net()
    params = parameters(network)
    (images, labels), (copies, classes) = batch(sum(sizes), 0), batch(2 * CLASSES, 1)
    copies = copies.requires_grad_()

    def gradient(real: Batch) -> Tensor:
        """Of the local part times its unit."""
        _, parts = PrototypeAlignment()(network, params, real, (copies, classes), ALL, CLASSES, n)
        last = list(parts.values())[-1]
        unit = by_hand(network, params, real, (copies, classes), n)[1]
        return torch.autograd.grad(last, copies)[0] * unit

    pieces = zip(images.split(sizes), labels.split(sizes), strict=True)
    total = sum(len(piece[1]) / len(labels) * gradient(piece) for piece in pieces)
    torch.testing.assert_close(total, gradient((images, labels)), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_unit_makes_it_independent_of_the_scale_of_features(factor: float) -> None:
    network = conv_net()
    params = parameters(network)
    scaled = {
        name: value * factor if name.startswith("features.1.") else value
        for name, value in params.items()
    }
    values = [
        PrototypeAlignment()(network, each, batch(5, 0), batch(CLASSES, 1), ALL, CLASSES, 2)[
            0
        ].detach()
        for each in (params, scaled)
    ]
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=0)


def test_images_that_are_all_the_same_are_aligned() -> None:
    network = conv_net()
    images = torch.ones(6, 2, 8, 8, dtype=torch.float64)
    same = images, torch.arange(6) % CLASSES
    value, _ = PrototypeAlignment()(network, parameters(network), same, same, ALL, CLASSES, 2)
    assert float(value) == 0


@pytest.mark.parametrize("n", [1, 2])
def test_it_vanishes_where_prototypes_agree_and_not_elsewhere(n: int) -> None:
    network = conv_net()
    params = parameters(network)
    images, labels = batch(6, 0)
    order = torch.randperm(6, generator=seeded(0))
    alignment = PrototypeAlignment(1.0)
    same = (images[order], labels[order])
    assert float(alignment(network, params, (images, labels), same, ALL, CLASSES, n)[0]) < 1e-20
    swapped = (images, (labels + 1) % CLASSES)
    assert float(alignment(network, params, (images, labels), swapped, ALL, CLASSES, n)[0]) > 1e-3


def test_a_class_without_real_images_pulls_at_nothing() -> None:
    network = conv_net()
    images, classes = batch(2 * CLASSES, 1)
    images = images.requires_grad_()
    value, _ = PrototypeAlignment()(
        network, parameters(network), batch(4, 0, classes=2), (images, classes), ALL, CLASSES, 2
    )
    (gradient,) = torch.autograd.grad(value, images)
    moved = gradient.flatten(1).ne(0).any(1)
    assert torch.equal(moved, classes < 2)


def problem(n: int, alignment: PrototypeAlignment | None) -> tuple[MetaLoss, dict[str, Tensor]]:
    synthetic = SyntheticDataset(images_per_class=2, batch_per_class=1, patches_per_side=n)
    outer = synthetic.create(torch.zeros(1, 2, 8, 8), torch.zeros(1), CLASSES, seeded(3))
    double = {name: value.detach().double().requires_grad_() for name, value in outer.items()}
    made = MetaLoss(conv_net(), synthetic, NoAugmentation(), torch.device("cpu"), alignment)
    return made, double


def hypergradient(
    n: int, alignment: PrototypeAlignment | None, estimator: bilevel.estimators.Estimator, seed: int
) -> bilevel.HypergradientResult:
    made, outer = problem(n, alignment)
    solve = bilevel.Hypergradient(made, bilevel.optim.sgd(0.1), steps=3, estimator=estimator)
    return solve(outer, batch(7, 11), seeded(seed))


@settings(max_examples=5)
@given(n=st.sampled_from([2, 4]), seed=seeds)
def test_the_hypergradient_of_patches_is_that_of_whole_images_cut(n: int, seed: int) -> None:
    whole, patched = (hypergradient(each, None, Adjoint(), seed) for each in (1, n))
    torch.testing.assert_close(patched.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        patched.grads["images"], split_patches(whole.grads["images"], n), rtol=1e-10, atol=1e-14
    )


@settings(max_examples=5)
@given(n=st.sampled_from([1, 2]), seed=seeds)
def test_with_alignment_adjoint_equals_reverse(n: int, seed: int) -> None:
    adjoint, reverse = (
        hypergradient(n, PrototypeAlignment(2.0), estimator, seed)
        for estimator in (Adjoint(), Reverse())
    )
    torch.testing.assert_close(adjoint.grads["images"], reverse.grads["images"], rtol=1e-9, atol=0)
    without = hypergradient(n, None, Adjoint(), seed)
    torch.testing.assert_close(adjoint.metrics["cross_entropy"], without.loss)
    torch.testing.assert_close(
        adjoint.loss,
        without.loss + 2.0 * sum(v for k, v in adjoint.metrics.items() if "alignment" in k),
    )
    assert not torch.allclose(adjoint.grads["images"], without.grads["images"])


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [(), (torch.tensor([2, 0]),)], ids=["all", "some"])
def test_with_alignment_the_outer_loss_can_be_traced_for_compilation(
    aligned: tuple[Tensor, ...],
) -> None:
    results = []
    for compile in (False, True):
        made, outer = problem(2, PrototypeAlignment())
        solve = bilevel.Hypergradient(made, bilevel.optim.sgd(0.1), steps=2, compile=compile)
        if compile:
            solve.inner.compiler = Compiler("eager")
        results.append(solve(outer, (*batch(7, 11), *aligned), seeded(0)))
    eager, traced = results
    torch.testing.assert_close(traced.metrics, eager.metrics)
    torch.testing.assert_close(traced.grads["images"], eager.grads["images"], rtol=1e-9, atol=0)


def test_the_outer_loss_moves_the_parameters_by_its_cross_entropy_alone() -> None:
    gradients = []
    for alignment in (None, PrototypeAlignment(100.0)):
        made, outer = problem(2, alignment)
        params = parameters(made.network)
        loss, _ = made.outer_loss(params, outer, batch(7, 11))
        gradients.append(torch.autograd.grad(loss, list(params.values())))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0}, "weight=0"),
        ({"weight": "1"}, "weight='1'"),
        ({"layer": ""}, "layer=''"),
        ({"layer": 3}, "layer=3"),
        ({"classes_per_step": 0}, "classes_per_step=0"),
        ({"experts": "runs/experts"}, r"experts.*@Experts\(\) with \(\)"),
        ({"parts": []}, r"parts=\[\]: it must be a list"),
        ({"parts": "global"}, "parts='global': it must be a list"),
        ({"parts": ["locale"]}, "parts='locale': it must be one of 'global', 'local'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrototypeAlignment(**arguments)  # type: ignore[arg-type]


def test_a_layer_or_patches_that_the_network_does_not_have_are_refused() -> None:
    network = ConvNet(CLASSES, channels=2, image_size=8, depth=2, width=4)
    PrototypeAlignment().check(network, (2, 8, 8), 2)
    PrototypeAlignment(parts=["local"]).check(network, (2, 8, 8), 2)
    with pytest.raises(ValueError, match=r"parts=\('local',\): .*patches_per_side=1"):
        PrototypeAlignment(parts=["local"]).check(network, (2, 8, 8), 1)
    for layer, n, message in (
        ("feature", 2, r"layer='feature': the network has features, features\.0"),
        ("classifier", 2, r"layer='classifier': it makes \[3\] of an image"),
        ("features", 4, r"patches_per_side=4: .*'features' makes \[4, 2, 2\] of an image"),
        ("features", 3, r"patches_per_side=3: "),
    ):
        with pytest.raises(ValueError, match=message):
            PrototypeAlignment(layer=layer).check(network, (2, 8, 8), n)
