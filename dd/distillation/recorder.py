"""What is kept and shown of a distillation: its files, TensorBoard, the progress bar."""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import final

from torch import Tensor

import bilevel
from bilevel.distributed import world_size
from dd.distillation.events import (
    Event,
    Finished,
    Ready,
    Skipped,
    StageChanged,
    Stepped,
    Validated,
    Validating,
    WentBack,
)
from dd.distillation.gallery import png
from dd.distillation.loop import Distillation
from dd.distillation.monitor import Monitor
from dd.distillation.progress import Progress
from dd.distillation.prototypes import nearest_real
from dd.distillation.rehearsal import LONG, STEPS_TO_WARN, least_seconds, warning_of_days
from dd.distillation.resuming import CHECKPOINT, DISTILLED, PREVIOUS
from dd.evaluation.distilled_set import DistilledSet
from dd.objectives.base import HELD_OUT
from dd.runtime.files import read_tensors, write_bytes
from dd.runtime.writer import orphaned

#: Bytes that are given back before the last save of a run that ran out of memory.
RESERVE = 2**24
#: Names in a run's folder.
PICTURE = "distilled.png"
EVENTS = "events"
AVERAGE = Path("snapshots") / "average.safetensors"
#: What TensorBoard calls the accuracies of a validation.
SHOWN_AS = {"images": "validation/accuracy", "average": "validation/accuracy_of_average"}


class Recorder(ABC):
    """Follows the events of a distillation."""

    @abstractmethod
    def take(self, event: Event) -> None:
        """Keep and show what an event tells."""

    @abstractmethod
    def save(self) -> None:
        """Bring the checkpoint and the sets up to date."""

    @abstractmethod
    def rescue(self, error: BaseException) -> None:
        """Save what is whole after an error, without which it would be lost."""

    @abstractmethod
    def show(self) -> None:
        """Show the set as it is now."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""


@final
class FolderRecorder(Recorder):
    """Keeps a run in a folder, and shows it in TensorBoard and on the terminal.

    Args:
        run: The distillation.
        folder: Where the files go.
        config_text: Shown in TensorBoard.
        advice: What to do where a CPU will not finish the run.
        then: What comes afterwards.
    """

    def __init__(
        self,
        run: Distillation,
        folder: Path,
        config_text: str,
        advice: str = "",
        then: str = "",
    ) -> None:
        settings, state = run.settings, run.state
        self.run = run
        self.folder = folder
        self.monitor = Monitor(folder / EVENTS, state.step, settings.inner_steps)
        self.monitor.config(config_text)
        self.progress = Progress(
            settings.outer_steps,
            settings.minutes,
            state.step,
            state.seconds,
            settings.validate_every,
            then,
        )
        for note in run.notes:
            self.progress.say(note)
        if state.processes != world_size():
            self.progress.say(
                f"note: this run had {state.processes} processes and goes on with "
                f"{world_size()}, so each outer step now averages as many hypergradients"
            )
        self.saved_at = time.monotonic()
        self._saved_step: int | None = None
        self._reserve = bytes(RESERVE)
        #: Where the run was when it was ready last.
        self._step, self._seconds = state.step, state.seconds
        self._first_step_told = self._warned = False
        self._advice = advice
        #: Profiles that are not shown again before the next picture is due.
        self._profiles_shown: set[str] = set()
        self._known_status = {"ok"}
        if run.task.device.type == "cpu":
            try:
                self._warn_of_days(least_seconds(run), at_least=True)
            except BaseException:
                self.close()  # an error is told on a line of its own, not behind the bar
                raise

    def take(self, event: Event) -> None:
        match event:
            case Ready():
                self._ready(event)
            case Stepped():
                self._stepped(event)
            case Skipped():
                self.progress.say(f"outer step {event.step} skipped: {event.reason}")
            case WentBack():
                self.progress.say(
                    f"outer step {event.given_up}: the run diverges and goes on from the point "
                    f"of its checkpoint, after outer step {event.step}, with rates {event.rates}"
                )
                self._step, self._seconds = event.step, self.run.state.seconds
            case StageChanged():
                self.progress.say(f"outer step {event.step}: {event.sentence}")
            case Validating():
                self.progress.validating(event.seconds, may_be_put_off=world_size() == 1)
            case Validated():
                self._validated(event)
            case Finished():
                pass

    def save(self) -> None:
        state = self.run.state
        state.save(self.folder / CHECKPOINT, previous=self.folder / PREVIOUS)
        if state.best_accuracy is None:
            self._keep("images")
        if state.average is not None:
            self.run.candidate("average").save(self.folder / AVERAGE)
        self._saved_step = state.step

    def rescue(self, error: BaseException) -> None:
        self._reserve = b""
        gc.collect()
        state = self.run.state
        if self.run.half_done or state.skipped_in_a_row or state.step == self._saved_step:
            return
        state.truncation.load_state_dict(self.run.schedule)
        self.save()

    def show(self) -> None:
        shown = self.run.candidate("images")
        step = self.run.state.step
        self.monitor.images(step, *self._pictured(shown))
        self.monitor.charts(step)

    def close(self) -> None:
        self.progress.close()
        self.monitor.close()

    def _ready(self, event: Ready) -> None:
        settings, state = self.run.settings, self.run.state
        if event.step == 0:
            # Whatever ends the run from here on, it can be resumed.
            self.save()
            self.show()
        if event.step == self._step:
            return  # no outer step was done since
        for minutes in settings.snapshot_minutes:
            if self._seconds < 60 * minutes <= state.seconds:
                name = f"{minutes:g}_minutes.safetensors"
                self.run.candidate("images").save(self.folder / "snapshots" / name)
        self._step, self._seconds = state.step, state.seconds
        if event.step % settings.image_every == 0:
            self.show()
        # While steps are skipped, the checkpoint before them is the better one.
        due = time.monotonic() - self.saved_at >= settings.checkpoint_seconds
        if due and not state.skipped_in_a_row:
            self.save()
            self.saved_at = time.monotonic()

    def _stepped(self, event: Stepped) -> None:
        if not self._first_step_told:
            self._first_step_told = True
            compiler = self.run.hypergradient.inner.compiler
            compiling = "" if compiler is None else f", {compiler.seconds:.0f} of them compiling"
            self.progress.say(f"first outer step after {event.seconds:.0f} s{compiling}")
        stage = None if event.stage is None else event.stage.name.lower()
        told = event.clip_bound, event.seconds, event.parts, stage
        self.monitor.outer_step(event.step, event.result, *told)
        self.monitor.scalars(event.step, event.objective)
        if HELD_OUT in event.metrics:
            self.monitor.scalars(event.step, {f"outer/{HELD_OUT}": event.metrics[HELD_OUT]})
        self.monitor.schedule(event.step, self._to_show(event))
        # Once of each kind: the rest of a status may have numbers that change every time.
        status = event.result.stats.status
        if status.split(":")[0] not in self._known_status:
            self._known_status.add(status.split(":")[0])
            self.progress.say(f"outer step {event.step}, said once: {status}")
        loss = float(event.result.loss)
        self.progress.update(event.step, self.run.state.seconds, loss, event.metrics, stage)
        if self.progress.steps_timed == STEPS_TO_WARN - 1:
            self._warn_of_days(self.progress.remaining())

    def _warn_of_days(self, seconds: float, at_least: bool = False) -> None:
        """Say, once, that a CPU will not finish this run."""
        if self.run.task.device.type == "cpu" and seconds > LONG and not self._warned:
            self._warned = True
            self.progress.say(warning_of_days(seconds, self._advice, at_least))

    def _to_show(self, event: Stepped) -> dict[str, Tensor | float]:
        """All numbers; a profile once after every `image_every` steps, as soon as it has all T."""
        settings = self.run.settings
        if event.step % settings.image_every == 0:
            self._profiles_shown.clear()
        shown: dict[str, Tensor | float] = {}
        for name, value in event.schedule.items():
            if not isinstance(value, Tensor):
                shown[name] = value
            elif len(value) == settings.inner_steps and name not in self._profiles_shown:
                shown[name] = value
                self._profiles_shown.add(name)
        return shown

    def _validated(self, event: Validated) -> None:
        if event.best is not None:
            self._keep(event.best)
        self.progress.validated()
        best = self.run.state.best_accuracy
        assert best is not None, "there is at least one candidate"
        found = {SHOWN_AS[name]: value for name, value in event.accuracy.items()}
        self.monitor.scalars(event.step, {**found, "validation/best_accuracy": best})

    def _keep(self, candidate: str) -> None:
        """Make a candidate the run's distilled set."""
        kept = self.run.candidate(candidate)
        kept.save(self.folder / DISTILLED)
        write_bytes(self.folder / PICTURE, png(*self._pictured(kept)))

    def _pictured(self, shown: DistilledSet) -> tuple[Tensor, int, Sequence[str], Tensor | None]:
        """What a picture of the set is made of."""
        asked, data = self.run.settings.nearest_real, self.run.task.data
        real = nearest_real(shown, data) if asked else None
        return shown.pixels(), shown.images_per_class, shown.class_names, real


@final
class SilentRecorder(Recorder):
    """Shows nothing, and keeps a checkpoint only if the first process is gone, or silent.

    Args:
        run: The distillation.
        folder: Of the run.
    """

    def __init__(self, run: Distillation, folder: Path) -> None:
        self.run = run
        self.folder = folder

    def take(self, event: Event) -> None:
        pass

    def save(self) -> None:
        pass

    def rescue(self, error: BaseException) -> None:
        # The lock of a first process that is stopped is this program's own.
        first_is_silent = isinstance(error, bilevel.SilentProcessError) and 0 in error.ranks
        lock = None if self.run.half_done else orphaned(self.folder)
        if self.run.half_done or (lock is None and not first_is_silent):
            return
        try:
            state, path = self.run.state, self.folder / CHECKPOINT
            if not path.exists() or read_tensors(path)[1]["step"] < state.step:
                state.truncation.load_state_dict(self.run.schedule)
                state.save(path, previous=self.folder / PREVIOUS)
        finally:
            if lock is not None:
                lock.release()

    def show(self) -> None:
        pass

    def close(self) -> None:
        pass
