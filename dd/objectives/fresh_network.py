"""What nested problems share whose inner run begins with a fresh network."""

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

import bilevel
from dd.augmentation import Augmentation
from dd.synthetic.dataset import SyntheticDataset


class FreshNetwork(bilevel.Problem, ABC):
    """θ_0 is an initialisation of the network, drawn anew for every outer step.

    Args:
        network: The module whose parameters are θ; only its structure is used.
        synthetic: The form of the set.
        augmentation: Of the images that the network sees.
        device: Where parameters live.
    """

    def __init__(
        self,
        network: nn.Module,
        synthetic: SyntheticDataset,
        augmentation: Augmentation,
        device: torch.device,
    ) -> None:
        self.network, self.synthetic = network, synthetic
        self.augmentation, self.device = augmentation, device

    def init(self, outer: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(self.network, generator, device=self.device)
