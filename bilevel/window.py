"""The inner steps that are differentiated, and what a schedule knows of them before the run."""

from dataclasses import dataclass
from numbers import Integral
from typing import final

from bilevel.errors import ConfigurationError


@dataclass(frozen=True)
class Window:
    """The inner steps [start, stop) that are differentiated; the outer loss is taken at θ_stop.

    Raises:
        ConfigurationError: Unless 0 ≤ start < stop, both integers.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        integers = isinstance(self.start, Integral) and isinstance(self.stop, Integral)
        if not (integers and 0 <= self.start < self.stop):
            raise ConfigurationError(
                f"window [{self.start}, {self.stop}): start must be at least 0 and below stop, "
                "both integers"
            )

    @property
    def width(self) -> int:
        """The number of inner steps that are differentiated."""
        return self.stop - self.start


@final
@dataclass(frozen=True)
class Plan:
    """How far to run, what to keep and record, and the window if it is known.

    Attributes:
        horizon: How many of the T inner steps to run, 1 … T.
        window: What will be differentiated, within [`earliest_start`, `horizon`); None where
            `Truncation.select` is to choose it from the recording.
        earliest_start: The first step at which the window may start; nothing before it is kept.
        signals: Names of the per-step signals that `select` will read, beside the inner loss. None
            where the window is known.

    Raises:
        ConfigurationError: The plan contradicts itself.
    """

    horizon: int
    window: Window | None = None
    earliest_start: int = 0
    signals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        window = self.window
        if not 0 <= self.earliest_start < self.horizon:
            raise ConfigurationError(
                f"earliest_start={self.earliest_start}, horizon={self.horizon}: it must be at "
                "least 0 and below the horizon"
            )
        if window is not None and (
            window.start < self.earliest_start or window.stop > self.horizon
        ):
            raise ConfigurationError(
                f"window=[{window.start}, {window.stop}): it must lie within [earliest_start, "
                f"horizon) = [{self.earliest_start}, {self.horizon})"
            )
        if window is not None and self.signals:
            raise ConfigurationError(
                f"signals={self.signals!r}: none is read where the window is known"
            )

    @classmethod
    def of(cls, window: Window) -> "Plan":
        """Run to the end of a known window, and keep what lies in it."""
        return cls(window.stop, window, window.start)
