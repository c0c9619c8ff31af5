"""Wall clock by what it went to."""

import time
from typing import final


@final
class Stopwatch:
    """Shares out the time since it was made; nothing waits for a device.

    Attributes:
        seconds: By the names that were given.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last call belongs to this name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
