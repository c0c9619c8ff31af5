"""The inner steps that are differentiated."""

from dataclasses import dataclass

from bilevel.errors import ConfigurationError


@dataclass(frozen=True)
class Window:
    """The inner steps [start, stop) that are differentiated; the outer loss is taken at θ_stop.

    Raises:
        ConfigurationError: Unless 0 ≤ start < stop.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigurationError(
                f"window [{self.start}, {self.stop}): start must be at least 0 and below stop"
            )

    @property
    def width(self) -> int:
        """The number of inner steps that are differentiated."""
        return self.stop - self.start
