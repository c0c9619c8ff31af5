"""The parameters of a network as one vector, and back."""

from torch import Tensor, nn


def named_parameters_of(network: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """The pieces of `vector`, [p], as the parameters of `network`, by name; differentiable."""
    shapes = {name: value.shape for name, value in network.named_parameters()}
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
