"""Distillation by matching stretches of the training trajectories of expert networks."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from dd.augmentation import Augmentation
from dd.networks import named_parameters_of
from dd.synthetic import SyntheticDataset


@final
class TrajectoryMatching(bilevel.Problem):
    """Train an expert's network on the synthetic set; judge it by where the expert went.

        θ_0 = start,   θ_{t+1} = θ_t − α ∇_θ ℓ(θ_t, (x, y)),
        ℓ(θ, (x, y)) = cross-entropy on augmented synthetic images x, labels y
        F(θ, φ)      = ‖θ − target‖² / ‖start − target‖²

    Outer variables are those of `SyntheticDataset`, and

    - `rate`, a scalar r with α = α₀ exp(r / α₀): α is positive whatever r is, and dα/dr = 1 at
      r = 0, so that an outer learning rate published for α keeps its meaning;
    - `start` and `target`, two points of an expert's trajectory, flat [p]. They are outer
      variables because they change from one outer step to the next and because F and the signals
      need them; nobody need learn them. Their derivatives cost next to nothing.

    Signals for `MinimumDistance` are `l1_distance` and `squared_l2_distance`, from an iterate to
    the target. Reports `rate` (α).

    Args:
        network: The module whose parameters are trained; only its structure is used.
        synthetic: How inner batches are drawn.
        augmentation: Applied to every inner batch.
        rate: α₀ > 0, where the learned rate starts.

    Source: Cazenavette et al., arXiv 2203.11932, equation 2; with `MinimumDistance`, Liu et al.,
    arXiv 2407.14245.
    """

    def __init__(
        self,
        network: nn.Module,
        synthetic: SyntheticDataset,
        augmentation: Augmentation,
        rate: float,
    ) -> None:
        self.network = network
        self.synthetic = synthetic
        self.augmentation = augmentation
        self.rate = rate
        self.names = [name for name, _ in network.named_parameters()]

    def init(self, outer: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        return named_parameters_of(self.network, outer["start"])

    def hyperparameters(self, outer: Any, step: int) -> dict[str, Tensor]:
        return {"lr": learned_rate(outer["rate"], self.rate)}

    def inner_batch(
        self, outer: Any, step: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        images, labels = self.synthetic.batch(outer, generator)
        return self.augmentation(images, generator), labels

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (images,)), labels)

    def signals(self, params: Any, outer: Any) -> Mapping[str, Tensor]:
        difference = self._flat(params) - outer["target"]
        return {
            "l1_distance": difference.abs().sum(),
            "squared_l2_distance": difference @ difference,
        }

    def outer_loss(self, params: Any, outer: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        target = outer["target"]
        reached, begun = self._flat(params) - target, outer["start"] - target
        return reached @ reached / (begun @ begun), {"rate": self.hyperparameters(outer, 0)["lr"]}

    def _flat(self, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([params[name].flatten() for name in self.names])


def learned_rate(variable: Tensor, start: float) -> Tensor:
    """α = α₀ exp(r / α₀) from the outer variable r."""
    return start * (variable / start).exp()
