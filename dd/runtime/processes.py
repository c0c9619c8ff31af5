"""The processes that `torchrun` starts: joining them, and sharing work out over them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from bilevel.distributed import gather, rank, world_size

T = TypeVar("T")

#: How long one process may wait for another. Some wait while others train whole networks; a
#: process that is gone is noticed at once, by its closed connection.
PATIENCE = timedelta(hours=12)


@contextmanager
def joined() -> Iterator[None]:
    """Make the processes that `torchrun` started one group; without `torchrun`, do nothing.

    Of the standard output, only what the first process prints is seen. Tensors on CUDA devices
    travel by NCCL where there is one, all else by Gloo.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield
        return
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    if rank() == 0:
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    distributed.destroy_process_group()


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
