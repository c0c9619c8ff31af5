"""The interface of a truncation schedule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConfigurationError
from bilevel.recording.trajectory import Trace
from bilevel.truncation.transition import Stage
from bilevel.window import Plan, Window


class Truncation(ABC):
    """Chooses which inner steps are differentiated.

    For every hypergradient it makes a `plan` before the inner run, and, where the plan leaves the
    window open, `select`s it from the recording; `update` follows when the outer step is done. A
    schedule fixes its configuration when it is made and changes only its state, which goes from one
    outer step to the next, so that it can be saved, resumed and compared. `generator` is always on
    the CPU.

    Attributes:
        metrics: Names of the metrics that `update` reads. Whoever runs the outer loop supplies
            them, and may leave out the cost of those that are not asked for.

    Example:
        The first ten steps of a run:

        >>> class First(bilevel.truncation.Truncation):
        ...     minimum_steps = 10
        ...
        ...     def plan(self, steps, generator):
        ...         return bilevel.truncation.Plan.of(bilevel.Window(0, 10))
        >>> First().plan(40, torch.Generator())
        Plan(horizon=10, window=Window(start=0, stop=10), earliest_start=0, signals=())
    """

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
    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        """What to run of T = `steps` inner steps this time, and the window if it is known."""

    def select(self, trace: Trace, generator: torch.Generator) -> Window:
        """The window over the recorded run, where the plan left it open.

        Raises:
            NotImplementedError: This schedule knows all its windows before the run.
        """
        raise NotImplementedError(
            f"the plan of {type(self).__name__} has no window, so it must define select"
        )

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
