"""What the processes of a group tell each other, and how they notice that one is gone or stopped.

They are those of `torch.distributed`'s default group, which the program initialises, for example
under `torchrun`. Without a group, or with one process in it, everything here is the identity.
"""

import os
import pickle
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from bilevel.errors import ProcessError, SilentProcessError
from bilevel.heartbeat import Heartbeat

T = TypeVar("T")

#: Looks at unfinished work, after which a process sleeps between two of them, and for how long.
_EAGER_LOOKS = 100
_PAUSE = 0.001

#: While the processes are watched.
_heartbeat: Heartbeat | None = None
#: Seconds for which a process that is heard of may be late; None: as long as it takes.
_latest: float | None = None
#: Whether this process waits for another no longer.
_given_up = False


def rank() -> int:
    """The number of this process, 0 … world_size() − 1."""
    return distributed.get_rank() if _initialised() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _initialised() else 1


def hurry(seconds: float) -> None:
    """From now on wait for no process for longer than this, since all are to end."""
    global _latest
    _latest = seconds if _latest is None else min(_latest, seconds)


def given_up() -> bool:
    """Whether a process was given up here, which leaves the group in a state that ends no more.

    `destroy_process_group`, and the end of the interpreter, would wait for that process.
    """
    return _given_up


def gather(value: T) -> list[T]:
    """What every process gives, ordered by rank; none goes on before all have given theirs.

    Args:
        value: Anything small that can be pickled, its tensors on the CPU.

    Raises:
        ProcessError: Another process is gone.
    """
    if world_size() == 1:
        return [value]
    device = _device_of_messages()
    message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    sizes = _gathered(torch.tensor([len(message)], device=device))
    padded = message.new_zeros(max(int(size) for size in sizes))
    padded[: len(message)] = message
    messages = [part[: int(size)] for part, size in zip(_gathered(padded), sizes, strict=True)]
    return [pickle.loads(part.cpu().numpy().tobytes()) for part in messages]


@contextmanager
def watched(patience: float) -> Iterator[None]:
    """Within it a process that is stopped is an error in the others, after `patience` seconds.

    Every process tells the others that it is there, through the store at `MASTER_ADDR` and
    `MASTER_PORT`, as `torchrun` sets them. In one process it does nothing.

    Raises:
        SilentProcessError: While waiting for a process of which nothing was heard.
    """
    global _heartbeat
    if world_size() == 1:
        yield
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _heartbeat = Heartbeat(*address, rank(), world_size(), patience)
    try:
        yield
    finally:
        _heartbeat.stop()
        _heartbeat = None


@contextmanager
def side_by_side(patience: float) -> Iterator[None]:
    """Within it all processes do the same, so one that is late by `patience` seconds hangs.

    It is for use within `watched`, whose patience is this one from now on.

    Raises:
        SilentProcessError: After waiting for as long.
    """
    global _latest
    before, _latest = _latest, patience
    if _heartbeat is not None:
        _heartbeat.patience = patience
    try:
        yield
    finally:
        _latest = before


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """(1/N) Σ_r tensor_r for each of `tensors`, new tensors with the same bits in every process.

    One all-reduce for each dtype and device that occurs.

    Args:
        tensors: Of floating point; of the same shapes, dtypes and order in every process.

    Raises:
        ProcessError: Another process is gone.
    """
    averaged = [tensor.detach().clone() for tensor in tensors]
    if world_size() == 1:
        return averaged
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in averaged:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        _wait(partial(distributed.all_reduce, flat, async_op=True))
        flat /= world_size()
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return averaged


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` with those of process 0, so that all start from the same bits.

    Raises:
        ProcessError: Another process is gone.
    """
    if world_size() > 1:
        for tensor in tensors:
            _wait(partial(distributed.broadcast, tensor.detach(), src=0, async_op=True))


def _gathered(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, which have one shape."""
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    _wait(partial(distributed.all_gather, parts, tensor, async_op=True))
    return parts


def _device_of_messages() -> torch.device:
    """Where the process group takes tensors that are on no particular device."""
    if "cpu" in distributed.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _wait(start: Callable[[], Any]) -> None:
    """Do what all processes do together; while it waits, signals are heard, and the others watched.

    Raises:
        ProcessError: Another process is gone, silent or late.
    """
    global _given_up
    if _heartbeat is not None:
        _heartbeat.arrive()
    began, looks = time.monotonic(), 0
    with _lost_processes_named():
        work = start()
        try:
            while not work.is_completed():
                looks += 1
                if looks > _EAGER_LOOKS:
                    time.sleep(_PAUSE)
                    _check_attendance(time.monotonic() - began)
        except BaseException:  # Ctrl-C too
            _given_up = True
            raise
        work.wait()


def _check_attendance(waited: float) -> None:
    """Raise if a process is silent, or if this one has waited for too long."""
    if _heartbeat is None:
        return
    silent = _heartbeat.silent()
    if silent:
        raise SilentProcessError(
            f"process {rank()} of {world_size()} has heard nothing of {_named(silent)} for "
            f"{_heartbeat.patience:g} seconds: stopped, or out of reach",
            silent,
        )
    if _latest is not None and waited > _latest:
        late = _heartbeat.behind()
        raise SilentProcessError(
            f"process {rank()} of {world_size()} has waited for {_named(late)} for {_latest:g} "
            "seconds: that process hangs, or needs more patience",
            late,
        )


def _named(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks)) or "another one"
    return f"process{'es' if len(ranks) > 1 else ''} {numbers}"


@contextmanager
def _lost_processes_named() -> Iterator[None]:
    try:
        yield
    except ProcessError:
        raise
    except RuntimeError as error:  # what torch.distributed raises when a connection is closed
        raise ProcessError(
            f"process {rank()} of {world_size()} cannot reach another one, which was killed or "
            f"has failed and says why itself ({textwrap.shorten(str(error), 160)})"
        ) from error


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
