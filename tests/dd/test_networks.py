"""Networks: sizes, values, and the derivatives that distillation takes of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from bilevel import fresh_parameters, refuse_running_statistics
from dd.networks import VGG11, AlexNet, ConvNet, ResNet18, ViT, network_for

Parameters = dict[str, Tensor]


def parameter_count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture
def network() -> ConvNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvNet(num_classes=4, image_size=8, depth=2, width=6).double()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def detached(network: torch.nn.Module) -> Parameters:
    return {name: value.detach() for name, value in network.named_parameters()}


def loss(network: ConvNet, parameters: Parameters, images: Tensor) -> Tensor:
    logits = functional_call(network, parameters, (images,))
    return F.cross_entropy(logits, torch.arange(len(images)) % 4)


@pytest.mark.parametrize(
    ("num_classes", "image_size", "depth", "count"),
    [
        (10, 32, 3, 320_010),  # published
        (200, 64, 4, 857_160),
        (1000, 64, 4, 2_496_360),
        (10, 128, 5, 615_690),
    ],
)
def test_the_parameter_counts_of_the_papers_networks(
    num_classes: int, image_size: int, depth: int, count: int
) -> None:
    network = ConvNet(num_classes, channels=3, image_size=image_size, depth=depth, width=128)
    assert parameter_count(network) == count
    assert network(torch.zeros(1, 3, image_size, image_size)).shape == (1, num_classes)


@settings(max_examples=20, deadline=None)
@given(
    num_classes=st.integers(1, 12),
    channels=st.integers(1, 4),
    depth=st.integers(1, 4),
    width=st.integers(1, 9),
    extra=st.integers(0, 9),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_parameter_count_and_logits_of_any_size(
    num_classes: int, channels: int, depth: int, width: int, extra: int, dtype: torch.dtype
) -> None:
    size = 2**depth + extra
    network = ConvNet(num_classes, channels, size, depth, width).to(dtype)
    convolutions = 9 * width * (channels + (depth - 1) * width) + depth * width
    linear = (width * (size // 2**depth) ** 2 + 1) * num_classes
    assert parameter_count(network) == convolutions + 2 * depth * width + linear
    logits = network(torch.randn(2, channels, size, size, dtype=dtype))
    assert logits.shape == (2, num_classes)
    assert logits.dtype == dtype


@pytest.mark.parametrize("name", ["num_classes", "channels", "depth", "width"])
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: it must be an integer (of at least|in) "):
        ConvNet(**{"num_classes": 10, name: 0})


def test_an_image_too_small_for_the_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size=15: with depth=4 it must be at least 16"):
        ConvNet(10, image_size=15, depth=4)


def test_logits_of_an_image_do_not_depend_on_its_batch(network: ConvNet, images: Tensor) -> None:
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, atol=1e-12, rtol=0.0)


def test_logits_do_not_depend_on_convolution_biases(network: ConvNet, images: Tensor) -> None:
    reference = network(images)
    parameters = detached(network)
    parameters["features.0.bias"] = parameters["features.0.bias"] + 3.0
    shifted = functional_call(network, parameters, (images,))
    torch.testing.assert_close(shifted, reference, atol=1e-10, rtol=0.0)


def test_no_buffers(network: ConvNet) -> None:
    assert not list(network.buffers())


def test_double_backward(network: ConvNet, images: Tensor) -> None:
    network = ConvNet(num_classes=4, channels=1, image_size=4, depth=1, width=2).double()
    parameters = detached(network)
    names = list(parameters)
    few = images[:2, :1, :4, :4].clone().requires_grad_()
    inputs = tuple(value.requires_grad_() for value in parameters.values())
    assert torch.autograd.gradgradcheck(
        lambda x, *values: loss(network, dict(zip(names, values, strict=True)), x), (few, *inputs)
    )


# Torch's own, on first use of forward mode.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_forward_over_reverse_is_reverse_over_reverse(network: ConvNet, images: Tensor) -> None:
    parameters = detached(network)
    tangent = {name: torch.cos(value * 7 + 1) for name, value in parameters.items()}

    def gradient(parameters: Parameters) -> Parameters:
        return grad(lambda p: loss(network, p, images))(parameters)

    (reverse,) = vjp(gradient, parameters)[1](tangent)
    forward = jvp(gradient, (parameters,), (tangent,))[1]
    torch.testing.assert_close(forward, reverse, atol=1e-12, rtol=1e-10)


def test_vmap_over_parameters(network: ConvNet, images: Tensor) -> None:
    several = {name: torch.stack((v, v.cos(), 2 * v)) for name, v in detached(network).items()}
    gradients = vmap(grad(lambda p: loss(network, p, images)))(several)
    for index in range(3):
        one = grad(lambda p: loss(network, p, images))({k: v[index] for k, v in several.items()})
        batched = {name: value[index] for name, value in gradients.items()}
        torch.testing.assert_close(batched, one, atol=1e-12, rtol=1e-10)


# The networks that sets are judged across.

OTHERS = {
    "AlexNet": lambda **sizes: AlexNet(width=4, **sizes),
    "VGG11": lambda **sizes: VGG11(width=2, **sizes),
    "ResNet18": lambda **sizes: ResNet18(width=2, **sizes),
    "ViT": lambda **sizes: ViT(width=8, depth=2, heads=2, **sizes),
}
each_other = pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)


def test_the_parameter_counts_of_the_definitions() -> None:
    """ResNet18 for CIFAR has 11,173,962, as its authors' form with batch normalisation has."""
    assert parameter_count(ResNet18(10)) == 11_173_962
    widths = (64, 128, 256, 256, 512, 512, 512, 512)
    convolutions = sum(9 * a * b + 3 * b for a, b in zip((3, *widths), widths, strict=False))
    assert parameter_count(VGG11(10)) == convolutions + 512 * 10 + 10
    shapes = ((3, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3))
    convolutions = sum((a * k * k + 1) * b for a, b, k in shapes)
    assert parameter_count(AlexNet(10)) == convolutions + 192 * 16 * 10 + 10


@each_other
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 64)])
def test_logits_of_each_image_alone(make: Any, channels: int, size: int) -> None:
    network = make(num_classes=5, channels=channels, image_size=size).double()
    images = torch.randn(3, channels, size, size, dtype=torch.float64)
    logits = network(images)
    assert logits.shape == (3, 5)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(logits, alone, atol=1e-10, rtol=0.0)
    refuse_running_statistics(network)


@each_other
def test_a_second_derivative_along_a_direction_is_that_of_differences(make: Any) -> None:
    network = make(num_classes=3, channels=1, image_size=32).double()
    parameters = fresh_parameters(network, torch.Generator().manual_seed(0))
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    direction = {name: torch.cos(value * 7 + 1) for name, value in parameters.items()}

    def slope(parameters: Parameters) -> Tensor:
        def loss(values: Parameters) -> Tensor:
            return F.cross_entropy(functional_call(network, values, (images,)), torch.arange(2))

        return vjp(grad(loss), parameters)[1](direction)[0]["classifier.weight"]

    def gradient(distance: float) -> Tensor:
        values = {n: v.detach() + distance * direction[n] for n, v in parameters.items()}
        values = {name: value.requires_grad_() for name, value in values.items()}
        loss = F.cross_entropy(functional_call(network, values, (images,)), torch.arange(2))
        return torch.autograd.grad(loss, values["classifier.weight"])[0]

    differences = (gradient(1e-6) - gradient(-1e-6)) / 2e-6
    exact = slope(parameters)
    assert float((exact - differences).norm()) < 1e-4 * float(exact.norm())


@each_other
def test_an_image_too_small_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        make(num_classes=3, image_size=3)


def drawn_globally(network: torch.nn.Module, generator: torch.Generator) -> Parameters:
    """Layers initialised from the global generator, children first: what distilled sets and
    experts of earlier versions were made with."""
    seed = int(torch.randint(2**62, (), generator=generator))

    def reset(module: torch.nn.Module) -> None:
        for child in module.children():
            reset(child)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset(network)
    return detached(network)


@pytest.mark.parametrize("make", [ConvNet, VGG11, AlexNet, ResNet18, ViT])
def test_fresh_parameters_are_the_same_bits_as_ever(make: Any) -> None:
    found = fresh_parameters(make(num_classes=5), torch.Generator().manual_seed(3))
    expected = drawn_globally(make(num_classes=5), torch.Generator().manual_seed(3))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Strange(nn.Module):
    """A network of somebody's own, with one thing wrong, or nothing."""

    wrong = ""

    def __init__(self, num_classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        if self.wrong == "made":
            raise ZeroDivisionError
        self.body = nn.Linear(7 if self.wrong == "shape" else channels * image_size**2, num_classes)

    def forward(self, images: Tensor) -> Any:
        assert not self.training
        logits = self.body(images.flatten(1))
        return {"tuple": (logits, logits), "logits": logits[:, 1:]}.get(self.wrong, logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("made", "cannot be made: ZeroDivisionError"),
        ("shape", "does not take them: .*shapes"),
        ("tuple", r"gives tuple of two images; it must be \(2, 4\)"),
        ("logits", r"gives \(2, 3\) of two images; it must be \(2, 4\)"),
    ],
)
def test_a_network_that_cannot_take_the_images_is_refused_at_once(wrong: str, message: str) -> None:
    make = type("Own", (Strange,), {"wrong": wrong})
    image_format = {"num_classes": 4, "channels": 3, "image_size": 5}
    with pytest.raises(ValueError, match=rf"^network: Own for 4 .* 3×5×5 {message}"):
        network_for(make, image_format)
    with pytest.raises(ValueError, match=r"is a list, no torch\.nn\.Module"):
        network_for(lambda **_: [], image_format)  # type: ignore[arg-type, return-value]
    assert network_for(Strange, image_format).training
