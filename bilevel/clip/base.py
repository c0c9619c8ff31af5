"""The interface of every clip, and the moving average that they share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bilevel.checks import check_number
from bilevel.errors import ConfigurationError, NonFiniteError


class Clip(ABC):
    """Clips gradients to a bound that follows a moving average of their norm n.

        e ← decay·e + (1 − decay)·min(n, cap·e)    (e starts at the first n; this comes first)
        bound = factor·e

    Args:
        decay: In [0, 1).
        factor: Positive.
        cap: What one outlier counts for in the average, at most, as a multiple of it; at least 1.
            None: its full norm, as published. A window over Adam's first steps can have a norm a
            hundred times the usual one. Uncapped, it lifts the average so far that it is hardly
            clipped itself, and then spoils the outer optimizer's second moments for long.

    Raises:
        ConfigurationError: An argument outside its range.

    Source: the released code of RaT-BPTT (arXiv 2311.07025), with decay 0.9 and factor 2;
    the cap is our own.
    """

    def __init__(self, decay: float = 0.9, factor: float = 2.0, cap: float | None = None) -> None:
        self.decay = check_number("decay", decay, minimum=0, below=1)
        self.factor = check_number("factor", factor, above=0)
        self.cap = math.inf if cap is None else check_number("cap", cap, minimum=1)
        self.average: float | None = None

    @abstractmethod
    def __call__(self, tensors: Iterable[Tensor]) -> tuple[float, float]:
        """Scale the `.grad` of `tensors` in place.

        Returns:
            (n before clipping, the bound).

        Raises:
            ConfigurationError: A tensor has no gradient.
            NonFiniteError: n is NaN or infinite; the average stays as it was.
        """

    def state_dict(self) -> dict[str, float | None]:
        """The moving average, None before the first call."""
        return {"average": self.average}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore the moving average.

        Raises:
            ConfigurationError: `state` has no average.
        """
        if "average" not in state:
            raise ConfigurationError(f"the state of a clip has an average, not {sorted(state)}")
        self.average = state["average"]

    def _bound(self, norm: float) -> float:
        """The bound once `norm` has moved the average."""
        if not math.isfinite(norm):
            raise NonFiniteError(f"the norm of the gradient to clip is {norm}")
        previous = norm if self.average is None else self.average
        counted = min(norm, self.cap * previous) if previous else norm
        self.average = self.decay * previous + (1 - self.decay) * counted
        return self.factor * self.average


def gradients_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The `.grad` of each tensor.

    Raises:
        ConfigurationError: One has none, or there is no tensor.
    """
    grads = [tensor.grad for tensor in tensors]
    found = [grad for grad in grads if isinstance(grad, torch.Tensor)]
    if not grads or len(found) < len(grads):
        raise ConfigurationError("every tensor to clip must have a gradient, at least one")
    return found
