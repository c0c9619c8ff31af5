"""Backpropagation through the whole inner run."""

from typing import final

import torch

from bilevel.truncation.base import Truncation
from bilevel.window import Plan, Window


@final
class Full(Truncation):
    """BPTT: differentiate every step, window [0, T).

    The only schedule whose hypergradient is that of the outer loss itself; over long runs it is
    the dearest and may explode or vanish.
    """

    @property
    def minimum_steps(self) -> int:
        return 1

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan.of(Window(0, steps))
