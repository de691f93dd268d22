"""How this process's C library treats freed memory."""

import ctypes
import os

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones, instead of giving it back to the system.

    By default the maps of every batch are given back and faulted in again page by page (tests/test_heap.py counts the
    faults). The process holds on to what it needed at its peak. Nothing is changed where there is no glibc, and where
    an environment variable of its allocator says that somebody has decided already.

    Returns:
        Whether it was set.

    Source: mallopt(3).
    """
    if any(variable in os.environ for variable in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))
