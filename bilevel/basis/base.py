"""The interface of a choice of directions, and what it is given and returns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.linear import LinearOperator


@dataclass(frozen=True)
class LowRankMatrix:
    """V diag(s) Vᵀ.

    Attributes:
        values: s, by falling magnitude, of shape [k].
        vectors: V, of shape [p, k].
    """

    values: Tensor
    vectors: Tensor

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape [p]."""
        return self.vectors @ (self.values * (self.vectors.T @ vector))


@dataclass
class Anchor:
    """The point of a window at which its curvature is taken, and what will be multiplied by it.

    Attributes:
        hessian: H at that point.
        gradient: ∇_θ ℓ there, of shape [p].
        cotangent: λ at the end of the window, of shape [p].
        response: By how much a unit of gradient moves each parameter, above 0, of shape [p].
        steps: The width W of the window.
        generator: Source of randomness.
    """

    hessian: LinearOperator
    gradient: Tensor
    cotangent: Tensor
    response: Tensor
    steps: int
    generator: torch.Generator

    @property
    def direction(self) -> Tensor:
        """u: where the recursion first needs the curvature, response · λ, of shape [p]."""
        return self.response * self.cotangent

    @cached_property
    def image(self) -> Tensor:
        """Hu, of shape [p]; one product, the first time."""
        return self.hessian(self.direction)


class Basis(ABC):
    """Replaces a Hessian by a matrix of low rank.

    Attributes:
        carries_over: What a call takes over from the one before, in words, as of an `Estimator`.
    """

    carries_over: str = ""

    @abstractmethod
    def approximate(self, anchor: Anchor) -> LowRankMatrix:
        """A matrix of low rank for H at the anchor."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save, of plain numbers and tensors. Empty without state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ConfigurationError: It was saved by something else.
        """
        if state:
            raise ConfigurationError(
                f"{type(self).__name__} has no state, but was given one with {sorted(state)}"
            )
