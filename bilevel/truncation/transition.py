"""The interface of what moves a schedule from stage to stage."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from math import isfinite
from typing import Any

from bilevel.errors import ConfigurationError


class Stage(IntEnum):
    """The stages of an outer run, in order."""

    EARLY = 0
    MIDDLE = 1
    LATE = 2


class Transition(ABC):
    """Decides when an outer run goes from early to middle to late. It never goes back.

    Like a schedule, it fixes its configuration when it is made and changes only its state.

    Attributes:
        metrics: Names of the metrics that `update` reads.
    """

    metrics: Sequence[str] = ()

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """The stage of the next outer step."""

    @abstractmethod
    def update(self, metrics: Mapping[str, float]) -> str | None:
        """Learn of an outer step's metrics.

        Returns:
            A sentence with the numbers that ended a stage, or None.

        Raises:
            ConfigurationError: A metric that it reads is missing or not finite.
        """

    @abstractmethod
    def report(self) -> dict[str, float]:
        """Numbers to watch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state to save, of plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Raises:
            ConfigurationError: Another kind of transition saved it.
        """


def read_metric(metrics: Mapping[str, float], name: str) -> float:
    """A metric that a schedule asks for, checked."""
    if name not in metrics:
        raise ConfigurationError(
            f"update was not given the metric {name!r}; it was given {sorted(metrics)}"
        )
    value = float(metrics[name])
    if not isfinite(value):
        raise ConfigurationError(f"the metric {name!r} is {value}; it must be finite")
    return value
