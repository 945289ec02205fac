"""Settings of the C library's allocator for a worker's use of memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names and numbers of malloc.h; mallopt(3)."""


def keep_freed_memory() -> None:
    """Let freed blocks stay with this process, where the C library is glibc; elsewhere nothing is done.

    By default glibc gives large blocks back to the system at once. A network on a CPU asks for the same ones again at
    every layer, and each time all their pages would be faulted in anew. The process then stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
