"""Backpropagation through the end of the inner run."""

from typing import final

import torch

from bilevel.checks import check_integer
from bilevel.truncation.base import Truncation
from bilevel.window import Plan, Window


@final
class Last(Truncation):
    """T-BPTT: differentiate the last W steps, window [T − W, T).

    Args:
        window: W ≥ 1.

    Raises:
        ConfigurationError: `window` is no such integer.

    Biased towards short horizons: what an outer variable does before step T − W is not seen.
    """

    def __init__(self, window: int) -> None:
        self.window = check_integer("window", window)

    @property
    def minimum_steps(self) -> int:
        return self.window

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan.of(Window(steps - self.window, steps))
