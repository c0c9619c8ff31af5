"""What is told on a terminal: text made fit for it, and one that may be gone."""

import io
from contextlib import suppress
from typing import TextIO


class HeardOrNot(io.TextIOBase):
    """A stream that goes on without whoever reads it: a closed terminal or pipe ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.isatty, self.fileno = stream.isatty, stream.fileno  # type: ignore[method-assign]

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def plain(text: str) -> str:
    """The text without what a terminal would obey: such characters are shown as escapes.

    A file may hold escape sequences that move the cursor or set the window's title, and characters
    that reverse the direction of what follows. Line ends and tabs stay.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str) -> str:
    """The text on one line, fit for a terminal."""
    return plain(" ".join(text.split()))


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3.5 h", "11 days"."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < most:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 and unit == "h" else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
