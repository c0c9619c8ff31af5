"""Memory that ran out: how it is told, and how much there is."""

import os
from typing import Any

import torch

from bilevel import ConfigurationError

#: What PyTorch's allocators say where they raise a plain `RuntimeError`.
_SAID = ("allocate memory", "Storage size calculation overflowed", "out of memory")


class NotEnoughMemoryError(MemoryError):
    """Memory ran out; the message says what to lower, and by how much."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def total(device: torch.device) -> int | None:
    """Bytes of memory that a device has; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names: dict[str, Any] = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # noqa: TID251


def check_fits(name: str, count: int, size: int, device: torch.device) -> None:
    """Refuse `count` things of `size` bytes each where a device has not even that much memory.

    Raises:
        ConfigurationError: It names how many would fit.
    """
    there = total(device)
    if there is not None and count * size > there:
        raise ConfigurationError(
            f"{name}={count}: they would take {count * size / 1e9:,.0f} GB at least, and there are "
            f"{there / 1e9:,.0f} GB, so at most {there // size} fit"
        )
