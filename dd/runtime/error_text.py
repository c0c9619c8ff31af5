"""An error in words, with the line of the user's own code that raised it."""

import sysconfig
import traceback
from pathlib import Path

#: Where code is that is no user's: this project, and all that is installed.
_OURS = tuple(str(Path(__file__).parents[2] / name) for name in ("dd", "bilevel"))
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def own_line(error: BaseException) -> str:
    """ " (in mine.py, line 3)", the innermost line of the user's own; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_own = not frame.filename.startswith((*_OURS, *_INSTALLED, "<"))
        if is_own and not _is_script(frame.filename):
            return f" (in {Path(frame.filename).name}, line {frame.lineno})"
    return ""


def summary(error: BaseException) -> str:
    """The kind of an error, what it says, on one line, and where it is, if that is the user's."""
    words = " ".join(_first_words(error).split())
    return f"{type(error).__name__}{f': {words}' if words else ''}{own_line(error)}"


def _first_words(error: BaseException) -> str:
    """Without what gin adds to a message: which call it was."""
    return str(error).partition("\n  In call to configurable")[0]


def _is_script(file: str) -> bool:
    """Whether it is what an installed command starts from."""
    return Path(file).parent == Path(sysconfig.get_path("scripts"))
