"""One writer: a folder that a program works in is closed to a second one."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dd.runtime.files import remove_leftovers, write_json
from dd.runtime.processes import from_first_process, is_first_process

#: The system frees the lock of a process that is gone, so the file itself means nothing.
LOCK = ".writer.lock"
#: Who holds it. Beside it, as some versions of `filelock` empty the lock's own file.
OWNER = ".writer.json"


class FolderInUseError(OSError):
    """Another program writes to this folder."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within it this program, in all its processes, is the only one that writes to `folder`.

    The folder is made. What killed writers left half written in it is removed.

    Raises:
        FolderInUseError: Another program does; the message names it.
        OSError: The folder cannot be written to.
    """
    lock = None
    problem: OSError | None = None
    if is_first_process():
        try:
            lock = _acquired(folder)
        except OSError as error:
            problem = error
    problem = from_first_process(problem)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                (folder / OWNER).unlink(missing_ok=True)
            lock.release()


def orphaned(folder: Path) -> FileLock | None:
    """The lock of a folder whose writer is gone, to be released; None while there is one."""
    try:
        return _acquired(folder)
    except OSError:
        return None


def this_process() -> dict[str, Any]:
    """Which process on which machine this is."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _acquired(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FolderInUseError(f"{folder} is in use: {_owner(folder)} writes to it") from error
    try:
        remove_leftovers(folder)
        write_json(folder / OWNER, this_process())
    except BaseException:
        lock.release()
        raise
    return lock


def _owner(folder: Path) -> str:
    try:
        found = json.loads((folder / OWNER).read_text("utf-8"))
        return f"process {int(found['pid'])} on {str(found['host'])!r}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
