"""Stop requests to a worker: a `threading.Event`, or a flag shared with forked children."""

from __future__ import annotations

import mmap
from typing import Protocol


class Stop(Protocol):
    """A stop request that a worker polls."""

    def is_set(self) -> bool:
        """Whether this worker must stop."""
        ...


class StopFlag:
    """A stop request in one byte of shared memory.

    It uses no lock: signal handlers can set it, and a killed child cannot leave a lock held.
    """

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        """Request a stop of all processes that share the flag."""
        self._byte[0] = 1

    def is_set(self) -> bool:
        """Whether this worker must stop."""
        return self._byte[0] == 1
