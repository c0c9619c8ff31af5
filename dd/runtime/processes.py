"""The processes that `torchrun` starts: joining them, and who of them does what."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from tqdm.auto import tqdm

from bilevel import Key
from bilevel.distributed import gather, given_up, rank, watched, world_size

T = TypeVar("T")

#: How long one process may wait for another that is alive. Some wait while others train whole
#: networks; a process that is gone is noticed at once, by its closed connection.
PATIENCE = timedelta(hours=12)
#: For how many seconds a process may not be heard of, until a run says otherwise.
SILENCE = 120.0


@contextmanager
def joined() -> Iterator[None]:
    """Make the processes that `torchrun` started one group; without `torchrun`, do nothing.

    Of the standard output, only what the first process prints is seen. Tensors on CUDA devices
    travel by NCCL where there is one, all else by Gloo.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield
        return
    _stay_on_this_machine()
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    with watched(SILENCE):
        if is_first_process():
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
    if not given_up():
        distributed.destroy_process_group()


def _stay_on_this_machine() -> None:
    """Where all processes are on one machine, let them talk over its loopback interface only.

    What they tell each other is pickled, so whoever can connect to them can run code in them.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return
    names = [name for _, name in socket.if_nameindex()]
    for name in ("lo", "lo0"):
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


@contextmanager
def one_first() -> Iterator[None]:
    """On every machine one process goes before the others, which then find what it downloaded.

    Raises:
        bilevel.ProcessError: That one failed.
    """
    goes_first = world_size() == 1 or local_rank() == 0
    if not goes_first:
        gather(None)
    yield
    if goes_first:
        gather(None)


def is_first_process() -> bool:
    """Whether this is the process that writes, shows and keeps the time."""
    return rank() == 0


def from_first_process(value: T) -> T:
    """What the first process gives; nobody goes on before all have come here.

    Raises:
        bilevel.ProcessError: Another process is gone.
    """
    return gather(value)[0]


def own_key(key: Key) -> Key:
    """The randomness of this process; the first one has that of a process alone."""
    return key if is_first_process() else key.fold("process", rank())


def which_process() -> str:
    """ " in process 1 of 2", or nothing in the first one."""
    return "" if is_first_process() else f" in process {rank()} of {world_size()}"


def progress_bar(**options: Any) -> tqdm:
    """A bar of `tqdm`, which only the first process shows."""
    return tqdm(**{"mininterval": refresh_seconds(), **options}, disable=not is_first_process())


def refresh_seconds() -> float:
    """How often a bar is drawn anew: rarely where it goes to a file, which keeps every one."""
    return 0.2 if sys.stderr.isatty() else 30.0


def own_share(count: int) -> range:
    """Which of `count` pieces of work are this process's: i where i mod N is its rank."""
    return range(rank(), count, world_size())


def collected(results: dict[int, T]) -> list[T]:
    """The results of all pieces of work, in order, from those of this process's share.

    Raises:
        bilevel.ProcessError: Another process is gone.
    """
    merged = {index: result for part in gather(results) for index, result in part.items()}
    return [merged[index] for index in sorted(merged)]


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"])
