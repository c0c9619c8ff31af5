"""Processes that take turns, each timing one function; without PyTorch, for JAX's side.

A worker prepares, makes its first call, prints one line of JSON about it, and then answers every
line "n" with the time of n further calls. `serve` is the worker's half, `Worker` the other.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

#: A turn lasts at least this long, in seconds.
TURN = 0.3


class NotOffered(Exception):
    """The library cannot say this problem."""


def serve(make: Callable[[], Callable[[], Sequence[Any]]], gradient: Path) -> None:
    """Answer until standard input ends.

    Args:
        make: Returns the function to time, which returns arrays.
        gradient: Where the arrays of the first call are written, as `.npy`, flat and in a row.
    """
    answers = sys.stdout
    sys.stdout = sys.stderr  # What a library prints is no answer.

    def answer(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    before = time.perf_counter(), _processor_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call = make()
            found = call()
    except NotOffered as reason:
        answer(absent=str(reason))
        return
    except Exception as error:  # whatever a library raises
        answer(absent=f"{type(error).__name__}: {str(error).strip()[:200]}")
        return
    first = time.perf_counter() - before[0], _processor_time() - before[1]
    np.save(gradient, np.concatenate([np.asarray(each).ravel() for each in found]))
    remarks = [str(each.message) for each in caught if "Compile" in each.category.__name__]
    answer(first_seconds=first[0], first_cpu_seconds=first[1], remark="; ".join(remarks))
    for line in sys.stdin:
        times = [_timed(call) for _ in range(int(line))]
        wall, processor = (min(each) for each in zip(*times, strict=True))
        answer(seconds=wall, cpu_seconds=processor, total=sum(each[0] for each in times))


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    start, processor_start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - processor_start


def _processor_time() -> float:
    """Of this process and of the compilers it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@final
class Worker:
    """A process that serves.

    Attributes:
        first: What it said of its first call; has "absent" where there was none.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        # Not a pipe, which nobody would empty.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            words,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        self.first: dict[str, Any] = json.loads(line) if line else {"absent": self._last_words()}
        self._calls = 1

    def turn(self) -> dict[str, float]:
        """Time of one call, the least of as many as fit into a turn."""
        self._process.stdin.write(f"{self._calls}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        found = json.loads(self._process.stdout.readline())  # type: ignore[union-attr]
        self._calls = max(1, round(self._calls * TURN / found["total"]))
        return found

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        self._process.communicate()
        self._errors.seek(0)
        errors = self._errors.read().strip().splitlines()
        return errors[-1][:200] if errors else "the process ended"
