"""Stop requests to a worker: an event of its own process, or a flag that a parent shares with forked children."""

from __future__ import annotations

import mmap
from typing import Protocol


class Stop(Protocol):
    """Whether this worker is asked to stop."""

    def is_set(self) -> bool: ...


class StopFlag:
    """One byte of shared memory. It has no lock: a signal handler may set it, and a killed child holds nothing."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        """Ask all processes that share the flag to stop."""
        self._byte[0] = 1

    def is_set(self) -> bool:
        """Whether this worker is asked to stop."""
        return self._byte[0] == 1
