"""A store of files in a folder.

A file is written under a temporary name, synced, verified by reading it back, and then renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from service.errors import StorageCorruptError, StorageError, StorageGoneError
from service.storage.base import CHUNK_BYTES, ROOT, ListedObject, StoredObject, file_sha256, object_key
from service.storage.scratch import remove_dead, scratch_folder

_FOLDERS_OF_KEY = 3
"""The folders of a key: job, stage and slot."""
_ATTEMPTS = 3


class FileStore:
    """Objects as files under one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._root.mkdir(parents=True, exist_ok=True)

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder for unfinished files, on the disk of the store. It is removed at the end of the block."""
        return scratch_folder(self._root)

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of a file and verify it. Raises StorageError."""
        sha256 = file_sha256(source)
        key = object_key(job_id, stage_id, slot, sha256)
        target = self._path(key)
        try:
            self._copy_in(source, target, sha256)
            return StoredObject(key, sha256, target.stat().st_size)
        except OSError as error:
            raise _failed(f"store {key}", error) from error

    def _copy_in(self, source: Path, target: Path, sha256: str) -> None:
        handle, part = _open_part(target.parent)
        try:
            with os.fdopen(handle, "wb") as part_file, source.open("rb") as source_file:
                shutil.copyfileobj(source_file, part_file, CHUNK_BYTES)
                part_file.flush()
                os.fsync(part_file.fileno())

            if file_sha256(part) != sha256:
                raise StorageError(f"the bytes of {target.name} changed while they were written")
            part.replace(target)
            _sync_folder(target.parent)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def borrow(self, key: str, sha256: str) -> Iterator[Path]:
        """The verified file of an object. Raises StorageError, or StorageCorruptError for different bytes."""
        path = self._path(key)
        try:
            actual = file_sha256(path)
        except OSError as error:
            raise _failed(f"read {key}", error) from error
        if actual != sha256:
            raise StorageCorruptError(f"{key}: expected SHA-256 {sha256}, got {actual}")
        yield path

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of an object. Raises StorageError before the first byte."""
        try:
            file = self._path(key).open("rb")
        except OSError as error:
            raise _failed(f"read {key}", error) from error
        return _chunks(file, start, stop)

    def remove(self, key: str) -> None:
        """Remove an object that no row references, and the folders that are empty then. Raises StorageError."""
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(f"remove {key}", error) from error

        with suppress(OSError):  # not empty, or removed meanwhile
            for folder in list(path.parents)[:_FOLDERS_OF_KEY]:
                folder.rmdir()

    def objects(self, folder: str = ROOT) -> Iterator[ListedObject]:
        """The files in a folder, including those of unfinished writes. Raises StorageError."""
        for parent, _, names in os.walk(self._root / folder, onerror=_raise_unless_gone):
            for name in names:
                path = Path(parent, name)
                try:
                    age = time.time() - path.stat().st_mtime
                except FileNotFoundError:  # renamed or removed meanwhile
                    continue
                yield ListedObject(path.relative_to(self._root).as_posix(), age)

    def probe(self) -> None:
        """Check that files can be written. Raises StorageError."""
        try:
            with tempfile.TemporaryFile(dir=self._root) as file:
                file.write(b"probe")
        except OSError as error:
            raise StorageError(f"cannot write to the storage: {error.strerror}") from error

    def remove_dead_scratch(self, older_than_seconds: float) -> int:
        """Remove scratch folders of this age whose processes have ended. Returns their number."""
        return remove_dead(self._root, older_than_seconds)

    def public_url(self, key: str, media_type: str) -> str | None:  # noqa: ARG002 - the interface of stores
        """None: files have no URL."""
        return None

    def _path(self, key: str) -> Path:
        """The file of a key. Raises StorageError if it is outside the folder."""
        path = (self._root / key).resolve()
        if not path.is_relative_to(self._root.resolve()) or path == self._root.resolve():
            raise StorageError(f"the key {key!r} is outside the store")
        return path


def _open_part(folder: Path) -> tuple[int, Path]:
    """Create a temporary file in a folder, which is created if it does not exist."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # a collection has removed the empty folder
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".part-", dir=folder)
            return handle, Path(name)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _chunks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of a file, which is closed at the end."""
    with file:
        file.seek(start)
        remaining = stop - start
        while remaining > 0:
            chunk = file.read(min(remaining, CHUNK_BYTES))
            if not chunk:
                return
            remaining -= len(chunk)
            yield chunk


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power failure. Does nothing on systems without O_DIRECTORY."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise_unless_gone(error: OSError) -> None:
    """Raise the error of a listing, unless the folder does not exist: a stage without objects has none."""
    if not isinstance(error, FileNotFoundError):
        raise _failed("list the objects", error) from error


def _failed(action: str, error: OSError) -> StorageError:
    """The StorageError of a failed action. Its message has no path, since clients see it."""
    error_type = StorageGoneError if isinstance(error, FileNotFoundError) else StorageError
    return error_type(f"cannot {action}: {error.strerror or type(error).__name__}")
