"""A search that any number of processes share, and that goes on wherever it was stopped."""

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from bilevel import ConfigurationError

#: How often a process says that it still works on its trial, and after what silence another one
#: takes the trial over.
HEARTBEAT_SECONDS, SILENCE_SECONDS = 10, 30
#: What a trial carries: its folder, and why it failed.
FOLDER, ERROR = "folder", "error"
#: Trials before the first one that may be pruned.
UNPRUNED = 5


def open_study(url: str, name: str, description: Mapping[str, Any]) -> optuna.Study:
    """The study of that name; a new one if there is none yet.

    Args:
        url: Of the database, as SQLAlchemy has it.
        name: Of the study.
        description: What it searches, which whoever joins must agree in.

    Raises:
        ConfigurationError: The database cannot be opened, or its study searches something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Heartbeats may change in a later version, which pyproject.toml shuts out.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        storage = optuna.storages.RDBStorage(
            url,
            # Several processes write to one file: wait for each other's locks.
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=SILENCE_SECONDS,
            heartbeat_stale_trial_callback=try_again,
        )
        if url.startswith("sqlite:"):
            _one_at_a_time(storage.engine)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=1),
        )
    except Exception as error:  # whatever a database has to say
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"--storage={url} cannot be used: {reason}") from error
    known = study.user_attrs or description
    for what, value in description.items():
        if known.get(what) != value:
            raise ConfigurationError(
                f"the study {name!r} in {url} has another {what}: repeat the command that started "
                f"it, or give another --sweep_dir; it had {known.get(what)!r}"
            )
        study.set_user_attr(what, value)
    return study


def _one_at_a_time(engine: sqlalchemy.Engine) -> None:
    """Have every transaction of SQLite's begin with the lock for writing.

    Else two processes may both read that a trial waits, and both begin it: SQLite has no lock for
    what is read in order to be written, and Python begins no transaction for reading.
    """

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # Python begins none

    def begun(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connected)
    sqlalchemy.event.listen(engine, "begin", begun)
    engine.dispose()  # connections from before


def search(
    study: optuna.Study,
    trials: int,
    objective: Callable[[optuna.Trial, Path], float],
    folder: Path,
    stopping: Callable[[], bool],
) -> None:
    """Do trials until there are so many, together with whoever else works on the study.

    A trial whose process is gone is taken over, in its folder.

    Args:
        study: Of `open_study`.
        trials: How many, of all processes together; those that failed count.
        objective: What is maximised, given the trial and its folder; it may raise `TrialPruned`.
        folder: Where the trials' folders go.
        stopping: Whether to begin no other trial.
    """

    def begun(trial: optuna.Trial) -> float:
        name = trial.user_attrs.get(FOLDER, f"trial-{trial.number:04d}")
        trial.set_user_attr(FOLDER, name)
        return objective(trial, folder / name)

    while not stopping():
        optuna.storages.fail_stale_trials(study)
        known = study.get_trials(deepcopy=False)
        done = sum(is_done(trial) for trial in known)
        running = sum(trial.state == TrialState.RUNNING for trial in known)
        waiting = any(trial.state == TrialState.WAITING for trial in known)
        if done >= trials:
            return
        if waiting or done + running < trials:
            study.optimize(begun, n_trials=1)
        else:  # others do the last ones, unless they are gone
            time.sleep(1)


def try_again(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> None:
    """Put a trial that nobody works on back in the queue, with its folder."""
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
        )
    )


def is_done(trial: FrozenTrial) -> bool:
    """Whether a trial has come to an end of its own: a value, pruned, or an error."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
