"""Objects as files in a folder.

A file is written under a temporary name, synced, read back and compared, then renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from service.errors import StorageCorruptError, StorageError, StorageGoneError
from service.storage.base import CHUNK_BYTES, ROOT, ListedObject, StoredObject, file_sha256, object_key
from service.storage.scratch import remove_dead, scratch_folder


class FileStore:
    """Objects as files under one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._root.mkdir(parents=True, exist_ok=True)

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder for unfinished files, on the store's own disk; removed at the end."""
        return scratch_folder(self._root)

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of the file `source`. Raises StorageError; storing the same bytes again is the same object."""
        sha256 = file_sha256(source)
        key = object_key(job_id, stage_id, slot, sha256)
        target = self._path(key)
        try:
            self._copy_in(source, target, sha256)
            return StoredObject(key, sha256, target.stat().st_size)
        except OSError as error:
            raise _failed(f"store {key}", error) from error

    def _copy_in(self, source: Path, target: Path, sha256: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as to, source.open("rb") as source_file:
                shutil.copyfileobj(source_file, to, CHUNK_BYTES)
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
            raise _failed(f"read {key}", error) from error
        if found != sha256:
            raise StorageCorruptError(f"{key}: expected SHA-256 {sha256}, got {found}")
        yield path

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The object's bytes from `start` up to, not including, `stop`. Raises StorageError before the first."""
        try:
            file = self._path(key).open("rb")
        except OSError as error:
            raise _failed(f"read {key}", error) from error
        return _pieces(file, start, stop)

    def remove(self, key: str) -> None:
        """Forget an object that no row names any more; nothing happens where it is not there."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _failed(f"remove {key}", error) from error

    def objects(self) -> Iterator[ListedObject]:
        """All files, those of unfinished copies too."""
        for folder, _, names in os.walk(self._root / ROOT):
            for name in names:
                path = Path(folder, name)
                try:
                    age = time.time() - path.stat().st_mtime
                except FileNotFoundError:  # renamed or removed just now
                    continue
                yield ListedObject(path.relative_to(self._root).as_posix(), age)

    def probe(self) -> None:
        """Whether files can be written just now. Raises StorageError."""
        try:
            with tempfile.TemporaryFile(dir=self._root) as file:
                file.write(b"probe")
        except OSError as error:
            raise StorageError(f"cannot write: {error.strerror}") from error

    def remove_dead_scratch(self, older_than_seconds: float) -> int:
        """Remove scratch folders that old whose processes are gone; how many there were."""
        return remove_dead(self._root, older_than_seconds)

    def public_url(self, key: str, media_type: str) -> str | None:  # noqa: ARG002 - as every store
        """None: files have no address of their own."""
        return None

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
            piece = opened.read(min(left, CHUNK_BYTES))
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


def _failed(what: str, error: OSError) -> StorageError:
    """Without the path: clients see it. The cause has the rest."""
    kind = StorageGoneError if isinstance(error, FileNotFoundError) else StorageError
    return kind(f"cannot {what}: {error.strerror or type(error).__name__}")
