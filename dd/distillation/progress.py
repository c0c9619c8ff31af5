"""The bar of a distillation: its stage, and when it will be done."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import final

from tqdm import tqdm

from dd.runtime.plain import duration, plain
from dd.runtime.processes import refresh_seconds

#: The time of a step is the median of so many.
STEPS_LOOKED_AT = 20


@final
class Progress:
    """A bar over outer steps, or over minutes where the run is limited by them.

    Args:
        outer_steps: The last outer step.
        minutes: The most minutes, or None.
        step: The step a resumed run goes on from.
        seconds: The seconds spent before.
        validate_every: Steps between validations; 0: there are none.
        then: What comes when all is done.
    """

    def __init__(
        self,
        outer_steps: int,
        minutes: float | None,
        step: int = 0,
        seconds: float = 0.0,
        validate_every: int = 0,
        then: str = "",
    ) -> None:
        self._validate_every, self._then, self._described = validate_every, then, "distilling"
        self._by_time = minutes is not None
        self._outer_steps = outer_steps
        self._limit = None if minutes is None else 60 * minutes
        self._step, self._seconds = step, seconds
        #: Seconds of the last steps, without the first one, in which things are done once; and
        #: of the wall clock, which also has what is done between them.
        self._steps: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._walls: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._last: float | None = None
        self._bar = tqdm(
            total=round(minutes * 60) if minutes is not None else outer_steps,
            initial=round(seconds) if minutes is not None else step,
            desc="distilling",
            unit="s" if self._by_time else "step",
            dynamic_ncols=True,
            mininterval=refresh_seconds(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]",
        )

    def update(
        self,
        step: int,
        seconds: float,
        loss: float,
        metrics: Mapping[str, float],
        stage: str | None = None,
    ) -> None:
        """Show the state after `step` outer steps and `seconds` of work, in a stage if any."""
        now, done = time.monotonic(), step - self._step
        if self._last is not None and done > 0:
            self._steps.append((seconds - self._seconds) / done)
            self._walls.append((now - self._last) / done)
        self._step, self._seconds, self._last = step, seconds, now
        shown = "".join(
            f", accuracy {100 * value:.1f} %" if name == "accuracy" else f", {name} {value:.3g}"
            for name, value in metrics.items()
        )
        left, speed = "", ""
        if self._steps:
            each = statistics.median(self._steps)
            speed = f", {each:.2f} s/step" if each > 1 else f", {1 / max(each, 1e-9):.2f} steps/s"
            left = f"{duration(self.remaining())} left{self._next()}, "
        self._bar.set_postfix_str(
            f"{left}step {step}, loss {loss:.3f}{shown}{speed}", refresh=False
        )
        self._described = "distilling" if stage is None else f"distilling, {stage} stage"
        self._bar.set_description_str(self._described, refresh=False)
        target = min(int(seconds), int(self._bar.total)) if self._by_time else step
        self._bar.update(target - self._bar.n)

    def validating(self, seconds: float, may_be_put_off: bool) -> None:
        """Show that there is a validation now, and about how long it takes."""
        hint = ", Ctrl-C puts it off" if may_be_put_off else ""
        self._bar.set_description_str(f"validating, about {duration(seconds)}{hint}")

    def validated(self) -> None:
        """Show that it is over."""
        self._bar.set_description_str(self._described)

    def _next(self) -> str:
        """What comes next, and when."""
        if self._validate_every:
            steps = self._validate_every - self._step % self._validate_every
            until = steps * self.seconds_per_step
            if until <= self.remaining():
                return f", validation in {duration(until)}"
        return f", then {self._then}" if self._then else ""

    @property
    def steps_timed(self) -> int:
        """Of how many steps, up to `STEPS_LOOKED_AT`, the time is known."""
        return len(self._steps)

    @property
    def seconds_per_step(self) -> float:
        """The time of an outer step."""
        return statistics.median(self._steps)

    def remaining(self) -> float:
        """Seconds of the wall clock until the end of the run, at the pace of the last steps."""
        work = statistics.median(self._steps)
        steps = float(self._outer_steps - self._step)
        if self._limit is not None:
            steps = min(steps, (self._limit - self._seconds) / max(work, 1e-9))
        # The mean, so that a validation after every so many steps is counted.
        between = max(0.0, statistics.fmean(self._walls) - statistics.fmean(self._steps))
        return max(steps, 0.0) * (work + between)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.write(plain(message), file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
