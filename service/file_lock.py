"""Exclusive file locks. The operating system releases them when their process ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from service.errors import AlreadyRunningError

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def file_lock(path: Path, wait_seconds: float = 0.0) -> Iterator[IO[bytes]]:
    """Hold the lock of the file at `path` within the block.

    A child process that inherits the open file also holds the lock, until it ends.

    Args:
        path: The file to lock; created if missing.
        wait_seconds: How long to wait for another process to release the lock.

    Raises:
        AlreadyRunningError: Another process still holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds

    with path.open("ab") as file:
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise AlreadyRunningError(f"another process holds the lock {path}")
            time.sleep(0.05)
        yield file
