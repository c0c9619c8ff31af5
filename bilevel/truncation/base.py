"""The interface of a truncation schedule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bilevel.errors import ConfigurationError
from bilevel.trajectory import Trace, Window


class Truncation(ABC):
    """Chooses which inner steps are differentiated.

    A schedule fixes its configuration when it is made and changes only its state, so that one
    schedule can be saved, resumed and compared. `generator` is always on the CPU.

    Attributes:
        signals: Names of the per-step signals that `select` reads from the trace.
    """

    signals: Sequence[str] = ()

    @property
    @abstractmethod
    def minimum_steps(self) -> int:
        """The least number of inner steps T that this schedule can work with."""

    @abstractmethod
    def horizon(self, steps: int, generator: torch.Generator) -> int:
        """How many of the T = `steps` inner steps to run this time, 1 … T."""

    @abstractmethod
    def earliest_start(self, horizon: int) -> int:
        """The first step at which a window over `horizon` recorded steps may start."""

    @abstractmethod
    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        """The window over the recorded run."""

    def update(self, metrics: Mapping[str, float]) -> None:
        """Learn of an outer step's metrics. A schedule without state ignores them."""

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


def check_window(window: int) -> int:
    """A window width as given by a user, checked."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigurationError(f"window={window!r}: it must be an integer of at least 1")
    return window
