"""What a schedule asks of an inner run before it starts."""

from dataclasses import dataclass
from typing import final

from bilevel.errors import ConfigurationError
from bilevel.window import Window


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
