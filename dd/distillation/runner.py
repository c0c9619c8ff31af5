"""A distillation recorded from its beginning, or where it was left, to its end."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bilevel.distributed import world_size
from dd.distillation.events import Event, Ready, Validating
from dd.distillation.loop import Distillation, outer_loop
from dd.distillation.recorder import FolderRecorder, Recorder, SilentRecorder
from dd.runtime.processes import is_first_process
from dd.runtime.stopping import StopRequest


def run_to_end(
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
