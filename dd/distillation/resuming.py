"""Going on with a run: from which checkpoint, and what is to be said of it."""

from collections.abc import Mapping
from typing import Any

import torch

import bilevel
from dd.distillation.state import TrainingState
from dd.evaluation.distilled_set import DistilledSet
from dd.objectives.base import DATA, Task
from dd.runtime.devices import device_name
from dd.runtime.files import DamagedFileError

#: The checkpoint in a run's folder.
CHECKPOINT = "checkpoint.safetensors"
#: The one before it, and one that was found to be damaged.
PREVIOUS, DAMAGED = "checkpoint.previous.safetensors", "checkpoint.damaged.safetensors"
#: The set that a run has found.
DISTILLED = "distilled.safetensors"


def circumstances(data: str, device: torch.device, versions: Mapping[str, str]) -> dict[str, Any]:
    """What a run should find again when it goes on.

    Args:
        data: A checksum of the training data.
        device: Where it works.
        versions: Of Python and the libraries, by name.
    """
    threads = torch.get_num_threads()
    return {DATA: data, "device": device_name(device), "threads": threads, **versions}


def restored(state: TrainingState, task: Task) -> list[str]:
    """Bring the state to that of the latest checkpoint that is good; what is to be said of it."""
    checkpoint, previous = task.folder.find(CHECKPOINT), task.folder.find(PREVIOUS)
    problem = f"{CHECKPOINT} is missing"
    try:
        if checkpoint is not None:
            state.restore(checkpoint)
        if checkpoint is not None or previous is None:
            return []
    except DamagedFileError as error:
        if previous is None:
            raise
        problem = str(error)
    state.restore(previous)
    return [f"note: {problem}; the run goes on from {previous}, after outer step {state.step}"]


def changed(state: TrainingState, task: Task) -> list[str]:
    """What is to be said of a run that is resumed in other circumstances.

    Raises:
        ConfigurationError: The data are others.
    """
    before, now = state.circumstances, task.circumstances
    changed = [name for name in before if name in now and before[name] != now[name]]
    if DATA in changed:
        raise bilevel.ConfigurationError(
            f"{task.folder.path} holds a run that was begun with other training data (checksum "
            f"{before[DATA]}, now {now[DATA]}): choose another --run_dir, or give it its own data"
        )
    if not changed:
        return []
    listed = ", ".join(f"{name} {before[name]}, now {now[name]}" for name in changed)
    return [f"note: this run had {listed}; its last digits may differ from there on"]


def missed(state: TrainingState, task: Task) -> list[str]:
    """If the best set so far cannot be read, forget it; what is to be said of that."""
    if state.best_accuracy is None or task.folder.path is None:
        return []
    try:
        DistilledSet.load(task.folder.path / DISTILLED)
    except (DamagedFileError, OSError) as error:
        state.best_accuracy = state.best_step = None
        return [f"note: the best set so far is lost: {error}; the best from here on is kept"]
    return []
