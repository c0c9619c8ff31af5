"""Reading what the next steps need while the present one is at work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

from torch import Tensor

__all__ = ["ReadAhead"]

#: How many steps are read ahead of the one that is asked for, each in a thread of its own.
STEPS_AHEAD = 2


@final
class ReadAhead:
    """Reads for a step in background threads, a few steps before it is asked for.

    Threads, not processes: reading is one copy of memory, or waiting for the disk, during which
    PyTorch holds no lock, so nothing has to be started, pickled, or sent back.

    Args:
        index: What to read for a step; a pure function, called in the thread that calls `at`.
        read: Reads it; called in the background.
    """

    def __init__(self, index: Callable[[int], Tensor], read: Callable[[Tensor], Tensor]) -> None:
        self._index, self._read = index, read
        self._threads = ThreadPoolExecutor(STEPS_AHEAD, thread_name_prefix="read-ahead")
        self._pending: dict[int, tuple[Tensor, Future[Tensor]]] = {}

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """(what `index` says for `step`, what `read` returns for it).

        Raises:
            Exception: Whatever `read` raised.
        """
        wanted = range(step, step + STEPS_AHEAD + 1)
        self._pending = {s: pending for s, pending in self._pending.items() if s in wanted}
        for later in wanted:
            if later not in self._pending:
                index = self._index(later)
                self._pending[later] = index, self._threads.submit(self._read, index)
        index, reading = self._pending.pop(step)
        return index, reading.result()
