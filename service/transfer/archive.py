"""The tar archive. It is written under a temporary name, read sequentially, and never extracted by its member names."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from sqlalchemy import Table as SqlTable

from service.errors import TransferError
from service.storage import file_sha256
from service.transfer.rows import TABLES, Row, columns, read_lines

FORMAT = 1
_HEADER = "header.json"
_MANIFEST = "manifest.json"
_ROWS = {f"rows/{table.name}.jsonl": f"{table.name}.jsonl" for table in TABLES}
_OBJECT = re.compile(r"objects/([0-9a-f]{64})")
_CHUNK_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class Header:
    """The header of an archive: the revision of the database, and the jobs that had not ended."""

    revision: str
    unfinished: tuple[str, ...]


class ArchiveWriter:
    """Adds members to an archive, and counts objects and their bytes."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._sha256: dict[str, str] = {}
        self.objects = 0
        self.object_bytes = 0

    def add_header(self, header: Header) -> None:
        """Add the first member."""
        content = {"format": FORMAT, "revision": header.revision, "unfinished": list(header.unfinished)}
        self._sha256[_HEADER] = self._add_json(_HEADER, content)

    def add_rows(self, table: str, file: Path) -> None:
        """Add the rows of a table."""
        name = f"rows/{table}.jsonl"
        self._sha256[name] = file_sha256(file)
        self._add_file(name, file)

    def add_object(self, sha256: str, file: Path) -> None:
        """Add an object with a verified SHA-256. Objects must be added in the order of their SHA-256."""
        self._add_file(f"objects/{sha256}", file)
        self.objects += 1
        self.object_bytes += file.stat().st_size

    def add_manifest(self) -> None:
        """Add the last member, which shows that the archive is complete."""
        self._add_json(_MANIFEST, {"sha256": self._sha256, "objects": self.objects})

    def _add_json(self, name: str, content: dict[str, Any]) -> str:
        text = json.dumps(content, sort_keys=True, indent=1).encode()
        self._add(name, len(text), io.BytesIO(text))
        return hashlib.sha256(text).hexdigest()

    def _add_file(self, name: str, file: Path) -> None:
        with file.open("rb") as opened:
            self._add(name, file.stat().st_size, opened)

    def _add(self, name: str, size: int, source: IO[bytes]) -> None:
        member = tarfile.TarInfo(name)  # times and owners stay 0
        member.size = size
        self._tar.addfile(member, source)
        self._tar.members = []  # type: ignore[attr-defined]  # saves memory: tarfile would keep all members


@contextmanager
def writing(path: Path) -> Iterator[ArchiveWriter]:
    """A new archive. It appears at `path` when the block ends without an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                yield ArchiveWriter(tar)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Archive:
    """A complete archive with verified checksums. Its rows are in files in `folder`."""

    path: Path
    folder: Path
    header: Header

    def rows(self, table: SqlTable, ids: Mapping[str, str] = MappingProxyType({})) -> Iterator[Row]:
        """The rows of a table.

        Args:
            table: The table.
            ids: Ids to replace everywhere in a row, by id in the archive.

        Raises:
            TransferError: A row is not JSON, or has unexpected columns.
        """
        expected = {column.key for column in columns(table)}
        try:
            for row in read_lines(self.folder / f"{table.name}.jsonl", ids):
                if set(row) != expected:
                    different = ", ".join(sorted(set(row) ^ expected))
                    raise TransferError(f"{self.path}: a row of {table.name} has unexpected columns: {different}")
                yield row
        except ValueError as error:
            raise TransferError(f"{self.path}: invalid row of {table.name}: {error}") from error

    def objects(self) -> Iterator[tuple[str, IO[bytes]]]:
        """The SHA-256 and content of all objects, in this order. Raises TransferError."""
        for name, source in _members(self.path):
            if match := _OBJECT.fullmatch(name):
                yield match[1], source


def check(path: Path, folder: Path) -> Archive:
    """Read a whole archive and verify all checksums.

    Args:
        path: The archive.
        folder: The folder into which the rows are copied.

    Raises:
        TransferError: The archive is damaged, incomplete, of a newer format, or not an export.
    """
    with reading(path):
        return _check(path, folder)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise errors of reading the archive as TransferError."""
    try:
        yield
    except (tarfile.TarError, OSError) as error:
        raise TransferError(f"{path}: cannot be read: {error}") from error


def _check(path: Path, folder: Path) -> Archive:
    # 1. the header
    members = _members(path)
    name, source = next(members, ("", io.BytesIO()))
    if name != _HEADER:
        raise TransferError(f"{path}: expected an export, whose first member is {_HEADER}, got {name!r}")
    text = source.read(_MAX_JSON_BYTES)
    header = _header(path, text)

    # 2. rows and objects, up to the manifest
    digests = {_HEADER: hashlib.sha256(text).hexdigest()}
    objects = 0
    last_object = ""
    for name, source in members:
        if name == _MANIFEST:
            _verify_manifest(path, source.read(_MAX_JSON_BYTES), digests, objects)
            if next(members, None) is not None:
                raise TransferError(f"{path}: expected {_MANIFEST} as the last member, got more")
            return Archive(path, folder, header)

        if match := _OBJECT.fullmatch(name):
            if _sha256(source) != match[1] or match[1] <= last_object:
                raise TransferError(f"{path}: {name} is damaged")
            objects += 1
            last_object = match[1]
        elif name in _ROWS and name not in digests:
            digests[name] = copy(source, folder / _ROWS[name])
        else:
            raise TransferError(f"{path}: unexpected or repeated member {name!r}")
    raise TransferError(f"{path}: the file is incomplete: it ends without {_MANIFEST}")


def copy(source: IO[bytes], target: Path) -> str:
    """Copy a stream into a file. Returns its SHA-256."""
    with target.open("wb") as file:
        return _sha256(source, file)


def _sha256(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """The SHA-256 of a stream, which is also copied into `target`."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The names and contents of all members. Raises TransferError for members that are not regular files."""
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            source = tar.extractfile(member) if member.isreg() else None
            if source is None:
                raise TransferError(f"{path}: {member.name!r} is not a regular file")
            yield member.name, source
            tar.members = []  # type: ignore[attr-defined]


def _header(path: Path, text: bytes) -> Header:
    content = _json_object(path, _HEADER, text)
    number = content.get("format")
    revision = content.get("revision")
    unfinished = content.get("unfinished")

    if isinstance(number, int) and number > FORMAT:
        raise TransferError(f"{path}: expected format {FORMAT} or older, got the newer format {number}")
    if number != FORMAT or not isinstance(revision, str) or not isinstance(unfinished, list):
        raise TransferError(f"{path}: {_HEADER} is damaged")
    return Header(revision, tuple(map(str, unfinished)))


def _verify_manifest(path: Path, text: bytes, digests: dict[str, str], objects: int) -> None:
    """Compare the manifest with the actual digests and number of objects. Raises TransferError."""
    content = _json_object(path, _MANIFEST, text)
    expected = content.get("sha256")
    if not isinstance(expected, dict) or set(expected) != {_HEADER, *_ROWS}:
        raise TransferError(f"{path}: {_MANIFEST} is damaged")

    for name, sha256 in expected.items():
        if digests.get(name) != sha256:
            raise TransferError(f"{path}: {name} is {'damaged' if name in digests else 'missing'}")
    if content.get("objects") != objects:
        raise TransferError(f"{path}: expected {content.get('objects')} objects, got {objects}")


def _json_object(path: Path, name: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise TransferError(f"{path}: {name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise TransferError(f"{path}: {name} is damaged")
    return content
