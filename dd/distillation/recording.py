"""A distillation recorded from its beginning, or where it was left, to its end."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import final

import bilevel
from bilevel.distributed import world_size
from dd.distillation.events import Event, Ready, Validating
from dd.distillation.loop import Distillation, outer_loop
from dd.distillation.recorder import FolderRecorder, Recorder
from dd.distillation.resuming import CHECKPOINT, PREVIOUS
from dd.runtime.files import read_tensors
from dd.runtime.processes import is_first_process
from dd.runtime.stopping import StopRequest
from dd.runtime.writer import orphaned


def record(
    run: Distillation,
    folder: Path,
    stop: StopRequest,
    config_text: str,
    advice: str = "",
    watch: Callable[[Event], object] = lambda event: None,
    then: str = "",
) -> None:
    """Distil until all is done or `stop` is requested; the files are then up to date.

    Args:
        run: The distillation.
        folder: Where the files go.
        stop: Looked at after every outer step, in every process.
        config_text: Shown in TensorBoard.
        advice: What to do where a CPU will not finish the run.
        watch: Called with every event, once it is recorded.
        then: What comes afterwards, for the bar to say.

    Raises:
        bilevel.NonFiniteError: Too many outer steps in a row had no finite hypergradient.
        bilevel.ProcessError: Another process failed or is gone.
    """
    recorder: Recorder = SilentRecorder(run, folder)
    if is_first_process():
        recorder = FolderRecorder(run, folder, config_text, advice, then)
    try:
        for event in outer_loop(run):
            stop.at_once = False
            recorder.take(event)
            watch(event)
            if isinstance(event, (Ready, Validating)) and stop.agreed():
                break
            # Nothing is lost by leaving a validation; of several processes all have to.
            stop.at_once = isinstance(event, Validating) and world_size() == 1
        recorder.save()
        recorder.show()
    except BaseException as error:
        # Whatever it is, it is told as itself, and the checkpoint before stays if this fails.
        with suppress(Exception):
            recorder.rescue(error)
        raise
    finally:
        with suppress(OSError):
            recorder.close()


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
