"""Where artifacts' bytes are: a folder of files whose keys the server builds.

A file appears under its key whole or not at all: written under a temporary name, synced, read back and compared,
then renamed. Clients never send a key or a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from api.core.errors import StorageCorruptError, StorageError

_CHUNK_BYTES = 1 << 20
_PART = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class StoredObject:
    """An object in the store: its key, the SHA-256 of its bytes and their number."""

    key: str
    sha256: str
    size_bytes: int


def object_key(job_id: str, stage_id: str, slot: str, sha256: str) -> str:
    """`jobs/{job}/{stage}/{slot}/{sha256}`. Raises StorageError for a part that is no plain name."""
    parts = (job_id, stage_id, slot, sha256)
    for part in parts:
        if not _PART.fullmatch(part) or ".." in part:
            raise StorageError(f"not a name for a part of a key: {part!r}")
    return "/".join(("jobs", *parts))


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileStore:
    """Objects as files under one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for unfinished files, on the store's own disk; removed at the end."""
        folder = Path(tempfile.mkdtemp(prefix=".scratch-", dir=self._root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of the file `source`. Raises StorageError; storing the same bytes again is the same object."""
        sha256 = file_sha256(source)
        key = object_key(job_id, stage_id, slot, sha256)
        target = self._path(key)
        try:
            self._copy_in(source, target, sha256)
            return StoredObject(key, sha256, target.stat().st_size)
        except OSError as error:
            raise StorageError(f"cannot store {key}: {error}") from error

    def _copy_in(self, source: Path, target: Path, sha256: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as to, source.open("rb") as source_file:
                shutil.copyfileobj(source_file, to, _CHUNK_BYTES)
                to.flush()
                os.fsync(to.fileno())
            if file_sha256(part) != sha256:
                raise StorageError(f"the bytes of {target.name} changed while they were written")
            part.replace(target)
            _sync_folder(target.parent)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def borrow(self, key: str, sha256: str) -> Iterator[Path]:
        """A local file with the object's bytes, checked; not to be changed, and there only within the block."""
        path = self._path(key)
        try:
            found = file_sha256(path)
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error}") from error
        if found != sha256:
            raise StorageCorruptError(f"{key}: expected SHA-256 {sha256}, got {found}")
        yield path

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The object's bytes from `start` up to, not including, `stop`. Raises StorageError before the first."""
        try:
            file = self._path(key).open("rb")
        except OSError as error:
            raise StorageError(f"cannot read {key}: {error}") from error
        return _pieces(file, start, stop)

    def remove(self, key: str) -> None:
        """Forget an object that no row names any more; nothing happens where it is not there."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {key}: {error}") from error

    def _path(self, key: str) -> Path:
        """The file of `key`; raises StorageError for one that leads out of the folder."""
        path = (self._root / key).resolve()
        if not path.is_relative_to(self._root.resolve()) or path == self._root.resolve():
            raise StorageError(f"the key {key!r} leads out of the store")
        return path


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    with file as opened:
        opened.seek(start)
        left = stop - start
        while left > 0:
            piece = opened.read(min(left, _CHUNK_BYTES))
            if not piece:
                return
            left -= len(piece)
            yield piece


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
