"""How a worker is asked to stop: an event of its own process, or a flag that a parent sets for forked children."""

from __future__ import annotations

import mmap
import os
from typing import Protocol


class Stop(Protocol):
    """Whether this worker is asked to stop."""

    def is_set(self) -> bool: ...


class StopFlag:
    """One byte of shared memory, without a lock: a signal handler sets it, and a killed child can hold nothing.

    It is made by the parent. A child that has lost its parent stops, too: the parent's successor starts one of its own,
    and the two would share a GPU.
    """

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)
        self._parent = os.getpid()

    def set(self) -> None:
        """Ask all processes that share the flag to stop."""
        self._byte[0] = 1

    def is_set(self) -> bool:
        """Whether this worker is asked to stop."""
        return self._byte[0] == 1 or self._parent not in (os.getpid(), os.getppid())
