"""Backpropagation through a window at a random place."""

from collections.abc import Mapping
from typing import Any, final

import torch

from bilevel.checks import check_integer
from bilevel.errors import ConfigurationError
from bilevel.truncation.base import Truncation
from bilevel.window import Plan, Window


@final
class RandomWindow(Truncation):
    """RaT-BPTT: window [stop − W, stop) with stop uniform on {W, …, T}.

    No step past `stop` is ever run, so an outer step costs (T + W)/2 inner steps on average.

    Args:
        window: W ≥ 1.
        refresh: For how many outer steps one draw serves (the released code draws once per pass
            over its real data, 10 outer steps).

    Raises:
        ConfigurationError: An argument outside its range.

    Source: Feng, Vedantam and Kempe, arXiv 2311.07025, section 3.
    """

    def __init__(self, window: int, refresh: int = 1) -> None:
        self.window = check_integer("window", window)
        self.refresh = check_integer("refresh", refresh)
        self._stop = 0
        self._uses_left = 0

    @property
    def minimum_steps(self) -> int:
        return self.window

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        if self._uses_left == 0 or self._stop > steps:
            self._stop = int(torch.randint(self.window, steps + 1, (), generator=generator))
            self._uses_left = self.refresh
        self._uses_left -= 1
        return Plan.of(Window(self._stop - self.window, self._stop))

    def state_dict(self) -> dict[str, int]:
        return {"stop": self._stop, "uses_left": self._uses_left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        stop, uses_left = state.get("stop"), state.get("uses_left")
        if (
            not isinstance(stop, int)
            or not isinstance(uses_left, int)
            or not 0 <= uses_left < self.refresh
            or (uses_left and stop < self.window)
        ):
            raise ConfigurationError(
                f"RandomWindow(window={self.window}, refresh={self.refresh}) cannot continue from "
                f"{dict(state)}: stop must be an integer of at least window, uses_left one in "
                "[0, refresh)"
            )
        self._stop, self._uses_left = stop, uses_left
