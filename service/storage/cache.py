"""Local copies of objects by their SHA-256, so that the stages of a worker need not fetch them again.

Copies are lent as hard links: a copy that another process drops stays with whoever borrowed it. Where the disk has no
hard links, nothing is kept.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from service.storage.base import file_sha256

_TRIMS_IN_FULL = 16
"""How many trims it takes to fill the folder: it may grow past its size by this part of it, for each process."""


class FileCache:
    """At most about `most_bytes` of files, those used last, in a folder that processes may share."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._untrimmed_bytes = most_bytes

    def lend(self, sha256: str, link: Path) -> bool:
        """Make `link` a file with these bytes; False where there is no sound copy, and `link` is then of no use."""
        kept = self._folder / sha256
        with suppress(OSError):
            os.link(kept, link)
            if file_sha256(link) == sha256:
                os.utime(link)
                return True
            kept.unlink(missing_ok=True)
        return False

    def keep(self, sha256: str, file: Path) -> None:
        """Keep the file, whose bytes have been checked."""
        size = file.stat().st_size
        if size > self._most_bytes:
            return
        with suppress(OSError):  # another process keeps it already, or there are no hard links
            os.link(file, self._folder / sha256)
            self._untrimmed_bytes += size
        if self._untrimmed_bytes * _TRIMS_IN_FULL >= self._most_bytes:
            self._trim()

    def _trim(self) -> None:
        self._untrimmed_bytes = 0
        found = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            left -= size
