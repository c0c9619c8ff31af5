"""`dd.train` in a process that is gone before one of the calls by which files change."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = [(os, "fsync"), (os, "replace"), (os, "chmod"), (os, "unlink"), (tempfile, "mkstemp")]


def crashing_train(words: list[str], point: int, counted: Path) -> None:
    """Run the command; before call number `point` of CALLS, be gone.

    Args:
        words: Of the command.
        point: From 0; −1: never.
        counted: Where the number of calls is written at the end.
    """
    from dd.train import main

    calls = 0

    def crashing(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if calls == point:
                os._exit(9)
            calls += 1
            return call(*arguments, **named)

        return called

    for module, name in CALLS:
        setattr(module, name, crashing(getattr(module, name)))
    status = main(words)
    counted.write_text(str(calls))
    sys.exit(status)
