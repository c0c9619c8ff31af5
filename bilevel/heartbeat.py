"""Whether the other processes are there: each tells so again and again, and hears the others.

A process that is gone is noticed by its closed connection. One that is stopped, or whose machine is
gone, keeps the others waiting for as long as the process group's timeout allows.
"""

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import final

from torch import distributed

#: Seconds between two beats, unless the patience is short.
EVERY = 5.0


@final
class Heartbeat:
    """Beats in a thread of its own, through a store that all processes reach.

    Args:
        host: Of the store.
        port: Of the store.
        rank: Of this process.
        world_size: How many processes there are.
        patience: Seconds after which one of which nothing was heard is silent. It may be changed.

    Raises:
        RuntimeError: There is no such store.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, patience: float) -> None:
        self.patience = patience
        self._rank = rank
        self._arrivals = 0
        now = time.monotonic()
        #: What each of the others told last, and since when it has been the same.
        self._heard = {other: ("", now) for other in range(world_size) if other != rank}
        # Of its own, so that nothing waits behind it, nor it behind anything.
        self._store = distributed.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def arrive(self) -> None:
        """Tell the others that this process has come to the next thing that all do together."""
        self._arrivals += 1

    def silent(self) -> list[int]:
        """The processes of which nothing was heard for as long as the patience is."""
        limit = time.monotonic() - self.patience
        return [other for other, (_, since) in sorted(self._heard.items()) if since < limit]

    def behind(self) -> list[int]:
        """The processes that are heard of, but have not come as far as this one."""
        arrived = {other: text.partition(" ")[2] for other, (text, _) in self._heard.items()}
        return [other for other in sorted(arrived) if int(arrived[other] or 0) < self._arrivals]

    def stop(self) -> None:
        """Beat no longer."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        beats = 0
        while not self._stop.wait(min(EVERY, self.patience / 4)):
            beats += 1
            with suppress(RuntimeError):  # an unreachable store makes all silent
                self._store.set(_key(self._rank), f"{beats} {self._arrivals}")
                for other in self._heard:
                    self._hear(other)

    def _hear(self, other: int) -> None:
        if self._store.check([_key(other)]):
            text = self._store.get(_key(other)).decode()
            if text != self._heard[other][0]:
                self._heard[other] = text, time.monotonic()


def _key(rank: int) -> str:
    return f"bilevel/heartbeat/{rank}"
