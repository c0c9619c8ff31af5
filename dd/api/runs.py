"""Whether a folder holds a run, and whether this one goes on with it."""

from pathlib import Path

from dd import config
from dd.distillation.resuming import CHECKPOINT, PREVIOUS
from dd.experiment import CONFIG
from dd.runtime.changes import WHEN_RESUMED


def is_resumed(folder: Path, text: str) -> bool:
    """Whether there is a run in the folder, which a configuration then goes on with.

    Raises:
        ConfigError: That run has another configuration.
        DamagedFileError, OSError: Its configuration cannot be read.
    """
    if not (folder / CHECKPOINT).exists() and not (folder / PREVIOUS).exists():
        return False
    saved = config.saved_text(folder / CONFIG)
    differences = config.differences(saved, text, config.changeable(WHEN_RESUMED))
    if differences:
        raise config.ConfigError(
            f"{folder} holds a run with another configuration ({'; '.join(differences)}): "
            "choose another --run_dir, or repeat the command that started it"
        )
    return True
