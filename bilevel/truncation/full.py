"""Backpropagation through the whole inner run."""

from typing import final

import torch

from bilevel.trajectory import Trace, Window
from bilevel.truncation.base import Truncation


@final
class Full(Truncation):
    """BPTT: differentiate every step, window [0, T).

    The only schedule whose hypergradient is that of the outer loss itself; over long runs it is
    the dearest and may explode or vanish.
    """

    @property
    def minimum_steps(self) -> int:
        return 1

    def horizon(self, steps: int, generator: torch.Generator) -> int:
        return steps

    def earliest_start(self, horizon: int) -> int:
        return 0

    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        return Window(0, trace.horizon)
