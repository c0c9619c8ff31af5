"""What networks get right of images that they were not trained on."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dd.data.stored_images import Images


@final
@dataclass(frozen=True)
class Accuracy:
    """Test accuracy over independent networks, fractions in [0, 1].

    Attributes:
        values: One for each network.
        steps: Training steps, chosen on the validation part.
        confusion: How many images of each class (row) were taken for each class (column), summed
            over networks: int64 [K, K].
    """

    values: tuple[float, ...]
    steps: int
    confusion: Tensor | None = field(default=None, compare=False)

    @property
    def mean(self) -> float:
        """Mean over networks."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over networks; 0 for one network."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def per_class(self) -> list[float | None]:
        """Mean over networks for each class; None of a class without test images."""
        if self.confusion is None:
            return []
        counts = self.confusion.sum(dim=1).tolist()
        right = self.confusion.diagonal().tolist()
        return [of / count if count else None for of, count in zip(right, counts, strict=True)]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "mean": self.mean,
            "std": self.std,
            "networks": len(self.values),
            "values": list(self.values),
            "steps": self.steps,
            **({} if self.confusion is None else {"per_class": self.per_class}),
        }


@torch.no_grad()
def accuracy(
    network: nn.Module, params: dict[str, Tensor], images: Images, labels: Tensor, chunk: int = 500
) -> float:
    """The fraction of images that the network labels rightly, `chunk` at a time."""
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    for part, predicted in _predictions(network, params, images, len(labels), chunk):
        correct += (predicted == labels[part]).sum()
    return int(correct) / len(labels)


@torch.no_grad()
def confusion(
    network: nn.Module,
    params: dict[str, Tensor],
    images: Images,
    labels: Tensor,
    num_classes: int,
    chunk: int = 500,
) -> Tensor:
    """How many images of each class (row) the network takes for each class (column).

    Returns:
        int64 [K, K], on the CPU.
    """
    counts = torch.zeros(num_classes**2, dtype=torch.int64)
    for part, predicted in _predictions(network, params, images, len(labels), chunk):
        pairs = labels[part] * num_classes + predicted
        counts += torch.bincount(pairs.cpu(), minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def _predictions(
    network: nn.Module, params: dict[str, Tensor], images: Images, count: int, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        yield part, functional_call(network, params, (images[part],)).argmax(dim=1)
