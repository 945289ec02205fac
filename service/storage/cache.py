"""A cache of objects by their SHA-256, so that the stages of a worker do not download them again.

It hands out hard links, so that a file stays valid when another process evicts it. A file system without hard links has
no cache.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from service.storage.base import file_sha256

_EVICTIONS_PER_FILL = 16
"""Each process evicts files after it has added 1/16 of the size, so the folder can exceed its size by this part."""


class FileCache:
    """A folder with the most recently used files, about `max_bytes` at most. Processes can share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._added_bytes = max_bytes

    def lend(self, sha256: str, link: Path) -> bool:
        """Create `link` as a hard link to the cached file. If this returns False, `link` must not be used."""
        cached = self._folder / sha256
        with suppress(OSError):
            os.link(cached, link)
            if file_sha256(link) == sha256:
                os.utime(link)
                return True
            cached.unlink(missing_ok=True)
        return False

    def keep(self, sha256: str, file: Path) -> None:
        """Add a file whose bytes have been verified."""
        size = file.stat().st_size
        if size > self._max_bytes:
            return

        with suppress(OSError):  # already added by another process, or no hard links
            os.link(file, self._folder / sha256)
            self._added_bytes += size
        if self._added_bytes * _EVICTIONS_PER_FILL >= self._max_bytes:
            self._evict()

    def _evict(self) -> None:
        """Remove the least recently used files until the size is within the limit."""
        self._added_bytes = 0
        files = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))

        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
