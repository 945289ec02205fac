"""The interface of stores, their keys and checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.errors import StorageError

CHUNK_BYTES = 1 << 20
ROOT = "jobs"
"""The first part of every key."""
_PART = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class StoredObject:
    """An object in the store: its key, its SHA-256 and its size."""

    key: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class ListedObject:
    """An object in a listing. `age_seconds` is the time since it was last written."""

    key: str
    age_seconds: float


class Store(Protocol):
    """Objects under keys. A transient failure raises StorageError, which is retryable."""

    def scratch(self) -> AbstractContextManager[Path]:
        """A local folder for unfinished files. It is removed at the end of the block."""
        ...

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of a file and verify it. Storing the same bytes again returns the same object.

        Args:
            job_id: The job of the artifact.
            stage_id: The stage that writes it.
            slot: The name of the artifact within the stage.
            source: The file.

        Raises:
            StorageError: The object cannot be written, or has different bytes when read back.
        """
        ...

    def borrow(self, key: str, sha256: str) -> AbstractContextManager[Path]:
        """A local file with the verified bytes of an object. It must not be modified or used after the block.

        Args:
            key: The key of the object.
            sha256: The expected SHA-256.

        Raises:
            StorageError: The object cannot be read.
            StorageCorruptError: The object has another SHA-256.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of an object. Raises StorageError, usually before the first byte."""
        ...

    def remove(self, key: str) -> None:
        """Remove an object that no row references. Does nothing if it does not exist. Raises StorageError."""
        ...

    def objects(self, folder: str = ROOT) -> Iterator[ListedObject]:
        """The objects in a folder, including leftovers of unfinished writes, page by page.

        Args:
            folder: `stage_folder` of a stage or `job_folder` of a job; by default all objects.

        Raises:
            StorageError: The objects cannot be listed.
        """
        ...

    def probe(self) -> None:
        """Check that objects can be stored. Raises StorageError within about a second."""
        ...

    def remove_dead_scratch(self, older_than_seconds: float) -> int:
        """Remove scratch folders of this age whose processes have ended. Returns their number."""
        ...

    def public_url(self, key: str, media_type: str) -> str | None:
        """A temporary URL for downloads that bypass this service, or None. Does not send a request."""
        ...


def object_key(job_id: str, stage_id: str, slot: str, sha256: str) -> str:
    """The key `jobs/{job}/{stage}/{slot}/{sha256}`. Raises StorageError for a part that is not a plain name."""
    return _joined(job_id, stage_id, slot, sha256)


def _joined(*parts: str) -> str:
    for part in parts:
        if not _PART.fullmatch(part) or ".." in part:
            raise StorageError(f"expected a plain name as part of a key, got {part!r}")
    return "/".join((ROOT, *parts))


def stage_folder(job_id: str, stage_id: str) -> str:
    """The folder of all keys of a stage. Raises StorageError for an id that is not a plain name."""
    return _joined(job_id, stage_id)


def job_folder(job_id: str) -> str:
    """The folder of all keys of a job. Raises StorageError for an id that is not a plain name."""
    return _joined(job_id)


def stage_of_key(key: str) -> str | None:
    """The id of the stage that wrote the object; None for a key that `object_key` did not build."""
    parts = key.split("/")
    return parts[2] if len(parts) == 5 and parts[0] == ROOT else None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
