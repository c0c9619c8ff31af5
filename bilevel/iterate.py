"""What one inner step starts from, and what it takes of the outer variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.tree import detach, to_device


@dataclass(frozen=True)
class Iterate:
    """One point of the inner run.

    Attributes:
        params: θ_t ∈ R^p, flat.
        state: s_t, the optimizer's state.
        gradient: ∇_θ ℓ(θ_t, b_t) ∈ R^p, where the rollout was asked to keep it.
    """

    params: Tensor
    state: Any
    gradient: Tensor | None = None

    def to(self, device: torch.device) -> Iterate:
        """The same on another device."""
        if self.params.device == device:
            return self
        gradient = None if self.gradient is None else self.gradient.to(device)
        return Iterate(self.params.to(device), to_device(self.state, device), gradient)

    def detached(self) -> Iterate:
        """The same without a graph."""
        return Iterate(*detach((self.params, self.state, self.gradient)))


class StepInputs(NamedTuple):
    """What inner step t takes of φ.

    Attributes:
        batch: b_t = B(φ, t), a pytree.
        hyperparameters: h_t = h(φ, t), by name; each a tensor or a pytree of tensors.
    """

    batch: Any
    hyperparameters: dict[str, Any]
