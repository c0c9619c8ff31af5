"""The interface of a truncation schedule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.trajectory import Trace, Window
from bilevel.truncation.transition import Stage


class Truncation(ABC):
    """Chooses which inner steps are differentiated.

    For every hypergradient `horizon`, `earliest_start` and `select` are called once, in this order;
    `update` follows when the outer step is done. A schedule fixes its configuration when it is made
    and changes only its state, so that one schedule can be saved, resumed and compared. `generator`
    is always on the CPU.

    Attributes:
        signals: Names of the per-step signals that `select` reads from the trace.
        metrics: Names of the metrics that `update` reads. Whoever runs the outer loop supplies
            them, and may leave out the cost of those that are not asked for.
    """

    signals: Sequence[str] = ()
    metrics: Sequence[str] = ()

    @property
    @abstractmethod
    def minimum_steps(self) -> int:
        """The least number of inner steps T that this schedule can work with."""

    @property
    def stage(self) -> Stage | None:
        """The stage of the next outer step; None of a schedule without stages."""
        return None

    @abstractmethod
    def horizon(self, steps: int, generator: torch.Generator) -> int:
        """How many of the T = `steps` inner steps to run this time, 1 … T."""

    @abstractmethod
    def earliest_start(self, horizon: int) -> int:
        """The first step at which a window over `horizon` recorded steps may start."""

    @abstractmethod
    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        """The window over the recorded run."""

    def update(self, metrics: Mapping[str, float]) -> str | None:
        """Learn of an outer step's metrics. A schedule without state ignores them.

        Returns:
            A sentence for the user when the schedule changes its course, else None.
        """
        return None

    def report(self) -> dict[str, float | Tensor]:
        """What to watch: numbers, and profiles over the inner steps of shape [T]. May be empty."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state to save, of plain numbers, strings and tensors. Empty without state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ConfigurationError: It was saved by another kind of schedule.
        """
        if state:
            raise ConfigurationError(
                f"{type(self).__name__} has no state, but was given one with {sorted(state)}"
            )
