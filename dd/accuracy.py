"""The accuracy of a network, and of several on the same task."""

import statistics
from dataclasses import dataclass
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
    """

    values: tuple[float, ...]
    steps: int

    @property
    def mean(self) -> float:
        """Mean over networks."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over networks; 0 for one network."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "mean": self.mean,
            "std": self.std,
            "networks": len(self.values),
            "values": list(self.values),
            "steps": self.steps,
        }


@torch.no_grad()
def accuracy(
    network: nn.Module, params: dict[str, Tensor], images: Images, labels: Tensor, chunk: int = 500
) -> float:
    """The fraction of images that the network labels rightly, `chunk` at a time."""
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        predicted = functional_call(network, params, (images[part],)).argmax(dim=1)
        correct += (predicted == labels[part]).sum()
    return int(correct) / len(labels)
