"""What a store does, and the keys and checksums that stores share."""

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
    """An object in the store: its key, the SHA-256 of its bytes and their number."""

    key: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class ListedObject:
    """An object as a listing shows it; `age_seconds` counts from when it was last written."""

    key: str
    age_seconds: float


class Store(Protocol):
    """Objects under keys. What fails for a passing reason raises StorageError, which is worth another try."""

    def scratch(self) -> AbstractContextManager[Path]:
        """A local folder for unfinished files; removed at the end."""
        ...

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of the file `source`. Raises StorageError; storing the same bytes again is the same object."""
        ...

    def borrow(self, key: str, sha256: str) -> AbstractContextManager[Path]:
        """A local file with the object's bytes, checked; not to be changed, and there only within the block.

        Raises StorageError, or StorageCorruptError where the bytes have another SHA-256.
        """
        ...

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to, not including, `stop`. Raises StorageError, as a rule before the first."""
        ...

    def remove(self, key: str) -> None:
        """Forget an object that no row names any more; nothing happens where it is not there."""
        ...

    def objects(self) -> Iterator[ListedObject]:
        """All objects, and leftovers of unfinished ones, page by page. Raises StorageError."""
        ...

    def probe(self) -> None:
        """Whether objects can be stored just now. Raises StorageError, within about a second."""
        ...

    def remove_dead_scratch(self, older_than_seconds: float) -> int:
        """Remove scratch folders that old whose processes are gone; how many there were."""
        ...

    def public_url(self, key: str, media_type: str) -> str | None:
        """Where a client gets the bytes without this service, for a while; None if nowhere. Asks no server."""
        ...


def object_key(job_id: str, stage_id: str, slot: str, sha256: str) -> str:
    """`jobs/{job}/{stage}/{slot}/{sha256}`. Raises StorageError for a part that is no plain name."""
    parts = (job_id, stage_id, slot, sha256)
    for part in parts:
        if not _PART.fullmatch(part) or ".." in part:
            raise StorageError(f"not a name for a part of a key: {part!r}")
    return "/".join((ROOT, *parts))


def stage_of_key(key: str) -> str | None:
    """The id of the stage whose object it is; None for a key that `object_key` did not make."""
    parts = key.split("/")
    return parts[2] if len(parts) == 5 and parts[0] == ROOT else None


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
