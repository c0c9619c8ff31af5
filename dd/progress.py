"""The progress bar of a distillation, and stopping it without losing anything."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import final

from tqdm import tqdm

from bilevel.distributed import gather, rank


@final
class Progress:
    """A bar over outer steps, or over minutes where the run is limited by them.

    Args:
        outer_steps: The last outer step.
        minutes: The most minutes, or None.
        step: The step a resumed run goes on from.
        seconds: The seconds spent before.
        shown: False in processes that are to be silent.
    """

    def __init__(
        self,
        outer_steps: int,
        minutes: float | None,
        step: int = 0,
        seconds: float = 0.0,
        *,
        shown: bool = True,
    ) -> None:
        self._by_time = minutes is not None
        self._outer_steps, self._first = outer_steps, (step, seconds)
        self._bar = tqdm(
            total=round(minutes * 60) if minutes is not None else outer_steps,
            initial=round(seconds) if minutes is not None else step,
            desc="distilling",
            unit="s" if self._by_time else "step",
            dynamic_ncols=True,
            disable=not shown,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed} < {remaining}{postfix}]",
        )

    def update(self, step: int, seconds: float, loss: float, metrics: Mapping[str, float]) -> None:
        """Show the state after `step` outer steps and `seconds` of work."""
        done, spent = step - self._first[0], seconds - self._first[1]
        rate = done / spent if spent else 0.0
        speed = f"{rate:.2f} steps/s" if rate >= 1 or not rate else f"{1 / rate:.2f} s/step"
        shown = ", ".join(
            f"accuracy {100 * value:.1f} %" if name == "accuracy" else f"{name} {value:.3g}"
            for name, value in metrics.items()
        )
        self._bar.set_postfix_str(
            f"step {step}, loss {loss:.3f}, {shown}, {speed}",
            refresh=False,
        )
        target = min(int(seconds), int(self._bar.total)) if self._by_time else step
        self._bar.update(target - self._bar.n)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@dataclass
class StopRequest:
    """Whether the user, or the system, has asked the program to stop."""

    signal_number: int | None = None
    at_once: bool = False

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    def agreed(self) -> bool:
        """Whether some process has been asked to stop: the same answer in all.

        Raises:
            bilevel.ProcessError: Another process is gone.
        """
        return any(gather(self.requested))


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one stops at once."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        at_once = request.requested or request.at_once
        request.signal_number = number
        if at_once:
            raise KeyboardInterrupt
        # Not print: the signal may arrive while the bar is being written.
        if rank() == 0:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
