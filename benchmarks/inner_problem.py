"""What the benchmark of inner loops knows of a problem."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Params = dict[str, Tensor]

#: Makes one hypergradient, a list in the order of `InnerProblem.outer`.
Call = Callable[[], list[Tensor]]


class InnerProblem(ABC):
    """An inner training run, and the outer loss at its end.

    Args:
        length: What the steps of the full problem are multiplied by.
        fresh: Whether every step has a batch of its own: as many rows as there are, drawn with
            replacement. Otherwise all steps share one batch.

    Attributes:
        full_steps: T of the full problem.
        full_window: How many of its last steps are differentiated; None for all.
        optimizer: "sgd" or "adam".
        rate: Its learning rate, where that is not learned.
        momentum: Of "sgd".
        scheduled: Whether every step has a learned rate of its own.
        outer: φ.
        start: θ_0, where that is not learned.
    """

    full_steps: int
    full_window: int | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    rate: float = 1.0
    momentum: float = 0.0
    scheduled: bool = False
    outer: Params
    start: Params

    def __init__(self, length: float = 1.0, *, fresh: bool = False) -> None:
        self.steps = max(2, round(self.full_steps * length))
        self.window = self.steps
        if self.full_window is not None:
            self.window = min(self.steps, max(1, round(self.full_window * length)))
        self.fresh = fresh
        self.rows: Tensor | None = None
        self.make(torch.Generator().manual_seed(0))

    @abstractmethod
    def make(self, draw: torch.Generator) -> None:
        """Set `outer`, `start` and the data."""

    @abstractmethod
    def batch(self, outer: Params, step: int) -> Params:
        """What the inner loss of step `step` needs of the outer variables and of fresh data."""

    @abstractmethod
    def inner_loss(self, params: Params, batch: Params) -> Tensor: ...

    @abstractmethod
    def outer_loss(self, params: Params, outer: Params) -> Tensor: ...

    def init(self, outer: Params) -> Params:
        """θ_0."""
        return self.start

    def learned_rate(self, outer: Params, step: int) -> Tensor | None:
        """The learning rate of step `step`, where it is learned."""
        return None

    def leaves(self) -> Params:
        """φ as leaves that require gradients."""
        return {name: value.clone().requires_grad_() for name, value in self.outer.items()}

    def double(self) -> "InnerProblem":
        """This problem, turned into float64."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, _double(value))
            elif isinstance(value, dict):
                setattr(self, name, {key: _double(each) for key, each in value.items()})
        return self

    def tensors(self) -> Params:
        """All data by name, a dictionary's as `name.key`."""
        found = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, dict):
                found |= {f"{name}.{key}": each for key, each in value.items()}
        return found

    def settings(self) -> dict[str, Any]:
        """The numbers that belong to `tensors`."""
        names = ("steps", "window", "optimizer", "rate", "momentum", "scheduled", "fresh")
        return {name: getattr(self, name) for name in names}

    def draw_rows(self, count: int, draw: torch.Generator) -> None:
        """Fix which of `count` rows every step sees, if steps have batches of their own."""
        if self.fresh:
            self.rows = torch.randint(count, (self.steps, count), generator=draw)

    def of_step(self, step: int, **data: Tensor) -> Params:
        """The rows of step `step`, or nothing where all steps share them."""
        if self.rows is None:
            return {}
        return {name: value[self.rows[step]] for name, value in data.items()}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
