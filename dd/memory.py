"""Keeping freed memory in the process, which on CPU nearly halves the time of a step."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


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
