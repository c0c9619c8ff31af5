"""Stopping a program without losing anything."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from bilevel.distributed import gather, hurry
from dd.runtime.processes import is_first_process

#: Seconds for which a process that is asked to stop waits for another; `torchrun` kills after 30.
LAST_WAIT = 10.0


@dataclass
class StopRequest:
    """Whether the user, or the system, has asked the program to stop."""

    signal_number: int | None = None
    at_once: bool = False
    by_caller: bool = False

    @property
    def requested(self) -> bool:
        """Whether this process has been asked."""
        return self.signal_number is not None or self.by_caller

    def agreed(self) -> bool:
        """Whether some process has been asked to stop: the same answer in all.

        Raises:
            bilevel.ProcessError: Another process is gone.
        """
        return any(gather(self.requested))


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one stops at once.

    So does the end of the terminal (SIGHUP), where there is that signal and it is not ignored, as
    under `nohup`.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        at_once = request.requested or request.at_once
        request.signal_number = number
        hurry(LAST_WAIT)
        if at_once:
            raise KeyboardInterrupt
        # Not print: the signal may arrive while the bar is being written.
        if is_first_process():
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
