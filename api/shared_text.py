"""A text that one process of the API computes and all of them use for a time."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_HEADER = struct.Struct("dQ")
"""Until when the text is used, by the monotonic clock, which all processes share; its length in bytes."""


class SharedText:
    """The text is in a file without a name, which forked processes share. So create this before they are forked."""

    def __init__(self) -> None:
        self._file = os.memfd_create("dfusion-shared-text")
        weakref.finalize(self, os.close, self._file)
        self._lock = threading.Lock()
        self._write(0.0, b"")

    def get(self, compute: Callable[[], tuple[bytes, float]]) -> bytes:
        """Return the text, computed again if it is too old. One thread of one process computes it; others wait.

        Args:
            compute: Returns a new text, and for how many seconds it is used.
        """
        with self._exclusive():
            valid_until, length = _HEADER.unpack(os.pread(self._file, _HEADER.size, 0))
            if time.monotonic() < valid_until:
                return os.pread(self._file, length, _HEADER.size)

            text, seconds = compute()
            self._write(time.monotonic() + seconds, text)
            return text

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude the other threads, then the other processes, whose lock is freed if they die."""
        with self._lock:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _write(self, valid_until: float, text: bytes) -> None:
        """Write the header last: if this process is killed before, the old text has expired and is not used."""
        os.pwrite(self._file, text, _HEADER.size)
        os.pwrite(self._file, _HEADER.pack(valid_until, len(text)), 0)
