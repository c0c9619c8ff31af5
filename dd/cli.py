"""What the commands share: arguments, errors and the table of results.

Importing it costs nothing: help and mistakes in arguments are told before PyTorch is imported.
"""

import argparse
import ctypes
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dd.runtime.plain import HeardOrNot, one_line, plain

#: Exit status after Ctrl-C, as the shell has it.
INTERRUPTED = 130
#: Exit status after an error that is no mistake of the user's.
FAILED = 1
#: The traceback of such an error.
TRACEBACK = "traceback.txt"
_tracebacks: Path | None = None
# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def add_gin_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--gin_file and --gin_param, each as often as one likes."""
    parser.add_argument(
        "--gin_file",
        action="append",
        required=required,
        default=None if required else [],
        metavar="FILE",
        help="configuration; given several times, later files override earlier ones",
    )
    parser.add_argument(
        "--gin_param",
        action="append",
        default=[],
        metavar="'NAME.PARAMETER = VALUE'",
        help="override one parameter, for example 'SyntheticDataset.images_per_class = 10'",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a Python module of your own first, which runs it: what it registers with gin "
        "can then be named",
    )


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which none may be empty: a shell variable that is not set makes it so."""
    _open_streams()
    given = sys.argv[1:] if arguments is None else arguments
    for argument in given:
        name, has_value, value = argument.partition("=")
        if not argument or (name.startswith("--") and has_value and not value):
            parser.error(f"{name or 'an argument'} is empty; leave it out, or give it a value")
    return parser.parse_args(arguments)


def _open_streams() -> None:
    """Make standard output and error fit to be written to, whatever a shell made of them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        # So that no character ends a run where the terminal's encoding has few of them.
        with suppress(AttributeError, ValueError):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def fail(message: str) -> int:
    """Print a one-line error; returns the exit status for a usage error."""
    from dd.runtime.processes import which_process

    print(f"error{which_process()}: {one_line(message)}", file=sys.stderr)
    return 2


def run(command: Callable[[], int]) -> int:
    """Run a command, under `torchrun` in every process, and end without a traceback.

    That is, when Ctrl-C, or a signal like it, comes outside the parts that handle it, such as while
    PyTorch is imported, when another process is gone, or when there is an error that nobody
    expected: its traceback goes to a file.
    """
    with _interrupted_by_signals():
        try:
            return _run(command)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that what it keeps is kept."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            with suppress(ValueError):  # in another thread than the main one
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(command: Callable[[], int]) -> int:
    from bilevel.distributed import given_up

    keep_freed_memory()
    threading.excepthook = _in_a_thread
    with redirect_stderr(HeardOrNot(sys.stderr)):
        status = _guarded(command)
    _flush()
    if given_up():
        os._exit(status)  # the interpreter's own end would wait for the process that is silent
    return status


def _in_a_thread(error: threading.ExceptHookArgs) -> None:
    """An error in a thread of TensorBoard's is raised again by its next call."""
    if not type(error.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(error)


def _guarded(command: Callable[[], int]) -> int:
    from bilevel import ProcessError
    from dd.runtime.processes import is_first_process, joined

    try:
        with joined():
            return command()
    except KeyboardInterrupt:
        if is_first_process():
            print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED  # who read the output wants no more of it
    except ProcessError as error:
        return fail(str(error))
    except Exception as error:
        return unexpected(error)


def keep_tracebacks_in(folder: Path) -> None:
    """From now on the traceback of an unexpected error goes into this folder."""
    global _tracebacks
    _tracebacks = folder


def unexpected(error: Exception) -> int:
    """Tell an error that nobody expected in one line, and where its traceback is."""
    from dd.runtime.error_text import summary
    from dd.runtime.files import write_text

    trace = "".join(traceback.format_exception(error))
    path = (_tracebacks or Path(tempfile.mkdtemp(prefix="dd-"))) / TRACEBACK
    try:
        write_text(path, trace)
        where = f"the traceback is in {path}"
    except OSError as problem:
        where = f"the traceback cannot be written: {problem}"
    advice = memory_advice(error)
    fail(f"{f'{type(error).__name__}: {advice}' if advice else summary(error)}; {where}")
    return FAILED


def memory_advice(error: BaseException) -> str | None:
    """What to lower where memory ran out; None for other errors."""
    from dd.runtime.memory import NotEnoughMemoryError, ran_out

    if isinstance(error, NotEnoughMemoryError):
        return f"out of memory: {error} ({error.__cause__ or 'no more is known'})"
    if not ran_out(error):
        return None
    return (
        "out of memory: lower what is made of many images at once, or set Experiment.images_on = "
        f"'host' for the dataset ({error})"
    )


def _flush() -> None:
    """Write what is still to be written, unless nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print text that may come from somebody else's files."""
    print(plain(text))


def print_results(results: Mapping[str, Any]) -> None:
    """Print the accuracies as a table."""
    per_class = results["images_per_class"]
    plural = "image" if per_class == 1 else "images"
    say(
        f"\ntest accuracy on {results['dataset']}, {per_class} {plural} per class, "
        f"{results['stored_floats']:,} stored floats, protocol {results['protocol']} (steps chosen "
        "on the validation split)\n"
    )
    say(f"{'training set':<20}{'accuracy':>18}{'networks':>10}{'steps':>8}")
    for name, accuracy in results["accuracy"].items():
        _print_row(name.replace("_", " "), accuracy)
    _print_classes(results)
    for architecture, across in results["architectures"].items():
        say(f"\non {architecture}")
        for name, accuracy in across.items():
            _print_row(name.replace("_", " "), accuracy)
    if results["baselines"]:
        say(f"\n{'as many images':<34}{'hard labels':>16}{'soft labels':>16}")
        for name, columns in results["baselines"].items():
            cells = (_cell(columns.get(labels)) for labels in ("hard_labels", "soft_labels"))
            say(f"{name.replace('_', ' '):<34}" + "".join(f"{cell:>16}" for cell in cells))
    if results["scores"]:
        say("\nDD-Ranking, in [0, 1]")
        for name, score in results["scores"].items():
            say(f"{name.replace('_', '-'):<20}{score:>18.3f}")


def _print_classes(results: Mapping[str, Any], most: int = 20) -> None:
    """The distilled set's accuracy on each class, unless there are many."""
    distilled, names = results["accuracy"].get("distilled"), results.get("class_names", ())
    if distilled is not None and 0 < len(distilled.get("per_class", ())) <= most:
        each = zip(names, distilled["per_class"], strict=True)
        cells = (f"{name} {'–' if of is None else f'{100 * of:.0f}'}" for name, of in each)
        say(f"\ndistilled, each class, %: {', '.join(cells)}")
    for name, problem in results.get("problems", {}).items():
        say(f"\n{name.replace('_', ' ')} could not be measured: {problem}")


def _print_row(label: str, accuracy: Mapping[str, Any] | None) -> None:
    if accuracy is None:
        say(f"{label:<20}{'not measured':>18}")
        return
    say(f"{label:<20}{_cell(accuracy):>18}{accuracy['networks']:>10}{accuracy['steps']:>8}")


def _cell(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None:
        return "–"
    return f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %"


def keep_freed_memory() -> bool:
    """Stop glibc from giving every large block back to the system as soon as it is freed.

    Activations are large, so by default each is mapped, zeroed page by page, and unmapped again
    in every step. Afterwards the process's size stays at its peak, and reuses what it has.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
