"""Settings of the C library's memory allocator for workers."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
"""Parameters of mallopt(3), as numbered in malloc.h."""


def keep_freed_memory() -> None:
    """Keep freed blocks in this process if the C library is glibc; otherwise do nothing.

    By default glibc returns large blocks to the system at once. A network on a CPU requests the same blocks again at
    every layer, and each time all their pages would be faulted in. The process therefore never shrinks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
