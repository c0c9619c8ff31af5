"""The folder of a run: read by every process, written by the first one."""

from collections.abc import Callable
from pathlib import Path
from typing import final

from dd.runtime.processes import is_first_process


@final
class RunFolder:
    """Where a run keeps its files.

    Args:
        path: The folder; it need not exist. None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def find(self, name: str) -> Path | None:
        """The path of a file, if it is there."""
        if self.path is None or not (self.path / name).exists():
            return None
        return self.path / name

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Have the file called `name` written; in all processes but the first, do nothing.

        Args:
            name: Below the folder.
            write: Writes a file, given its path.
        """
        if self.path is not None and is_first_process():
            write(self.path / name)
