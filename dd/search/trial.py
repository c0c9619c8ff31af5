"""One trial of a search: a distillation, judged on the validation split as it goes."""

from collections.abc import Callable
from pathlib import Path
from typing import final

from dd import config
from dd.distillation.loop import Ready, begin, outer_loop, progress
from dd.distillation.recorder import FolderRecorder
from dd.distillation.validation import validate
from dd.experiment import CONFIG, Experiment
from dd.runtime.files import write_text
from dd.runtime.stopping import StopRequest


@final
class Stopped(Exception):
    """The user asked to stop; what was done is kept."""


def distil(
    experiment: Experiment,
    folder: Path,
    looks: int,
    stop: StopRequest,
    promising: Callable[[int, float], bool],
) -> float:
    """Distil into a run directory, or go on there; never look at the test set.

    Args:
        experiment: What to do.
        folder: The run directory.
        looks: How often the set is judged, at equal parts of the run's steps or minutes.
        stop: Looked at after every outer step.
        promising: Told a look's number, from 1, and the best accuracy up to it; False ends the run.

    Returns:
        The best accuracy on the validation split, a fraction: that of the set that is kept.

    Raises:
        Stopped: That was asked for.
        BilevelError, DamagedFileError: The run failed.
    """
    settings = experiment.distiller
    data = experiment.prepare()
    text = config.text()
    run = begin(settings, experiment.task(data, folder, config=text))
    state = run.state
    write_text(folder / CONFIG, text)
    recorder = FolderRecorder(run, folder, text)
    seen = int(looks * min(progress(settings, state), 1))

    def best_after_a_look() -> float:
        recorder.take(validate(run))
        assert state.best_accuracy is not None, "it was just measured"
        return state.best_accuracy

    try:
        for event in outer_loop(run):
            recorder.take(event)
            if not isinstance(event, Ready):
                continue
            look = int(looks * min(progress(settings, state), 1))
            if look > seen:
                seen = look
                if not promising(look, best_after_a_look()):
                    break
            if stop.requested:
                raise Stopped
        return best_after_a_look() if state.best_accuracy is None else state.best_accuracy
    finally:
        recorder.save()
        recorder.close()
