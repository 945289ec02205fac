"""The tar file: written under a temporary name, read from its beginning to its end, and never unpacked by its names."""

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
_HEADER, _MANIFEST = "header.json", "manifest.json"
_OBJECT = re.compile(r"objects/([0-9a-f]{64})")
_CHUNK_BYTES = 1 << 20
_MOST_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class Header:
    """What the file says of itself. `unfinished` are the jobs that had not ended."""

    revision: str
    unfinished: tuple[str, ...]


class ArchiveWriter:
    """Adds members; counts what it has added."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._sha256: dict[str, str] = {}
        self.objects, self.object_bytes = 0, 0

    def add_header(self, header: Header) -> None:
        """The first member."""
        said = {"format": FORMAT, "revision": header.revision, "unfinished": list(header.unfinished)}
        self._sha256[_HEADER] = self._add_json(_HEADER, said)

    def add_rows(self, table: str, file: Path) -> None:
        """A table's rows."""
        name = f"rows/{table}.jsonl"
        self._sha256[name] = file_sha256(file)
        self._add_file(name, file)

    def add_object(self, sha256: str, file: Path) -> None:
        """An object, whose SHA-256 has been checked; they come in the order of these."""
        self._add_file(f"objects/{sha256}", file)
        self.objects += 1
        self.object_bytes += file.stat().st_size

    def add_manifest(self) -> None:
        """The last member, without which the file is not whole."""
        self._add_json(_MANIFEST, {"sha256": self._sha256, "objects": self.objects})

    def _add_json(self, name: str, content: dict[str, Any]) -> str:
        text = json.dumps(content, sort_keys=True, indent=1).encode()
        self._add(name, len(text), io.BytesIO(text))
        return hashlib.sha256(text).hexdigest()

    def _add_file(self, name: str, file: Path) -> None:
        with file.open("rb") as opened:
            self._add(name, file.stat().st_size, opened)

    def _add(self, name: str, size: int, source: IO[bytes]) -> None:
        member = tarfile.TarInfo(name)  # its times and owners stay 0
        member.size = size
        self._tar.addfile(member, source)
        self._tar.members = []  # type: ignore[attr-defined]  # it would keep them all


@contextmanager
def writing(path: Path) -> Iterator[ArchiveWriter]:
    """A new file at `path`, which is there once the block has ended well."""
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
    """A file that has been read to its end and is whole; its rows are in files in `folder`."""

    path: Path
    folder: Path
    header: Header

    def rows(self, table: SqlTable, ids: Mapping[str, str] = MappingProxyType({})) -> Iterator[Row]:
        """A table's rows, with every id that `ids` knows replaced. Raises TransferError for other columns."""
        expected = {column.name for column in columns(table)}
        try:
            for row in read_lines(self.folder / f"{table.name}.jsonl", ids):
                if set(row) != expected:
                    raise TransferError(f"{self.path}: a row of {table.name} has other columns than are expected")
                yield row
        except ValueError as error:
            raise TransferError(f"{self.path}: a row of {table.name} cannot be read: {error}") from error

    def objects(self) -> Iterator[tuple[str, IO[bytes]]]:
        """The objects, in the order of their SHA-256. Raises TransferError."""
        for name, source in _members(self.path):
            if found := _OBJECT.fullmatch(name):
                yield found[1], source


def check(path: Path, folder: Path) -> Archive:
    """Read the whole file and compare every byte with its checksum; rows are copied into `folder`.

    Raises TransferError for a file that is damaged or incomplete, of a newer format, or no export at all.
    """
    with reading(path):
        return _check(path, folder)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Where the file cannot be read on, that is a TransferError."""
    try:
        yield
    except (tarfile.TarError, OSError) as error:
        raise TransferError(f"{path}: cannot be read: {error}") from error


def _check(path: Path, folder: Path) -> Archive:
    members = _members(path)
    name, source = next(members, ("", io.BytesIO()))
    if name != _HEADER:
        raise TransferError(f"{path}: expected an export, whose first member is {_HEADER}")
    text = source.read(_MOST_JSON_BYTES)
    header = _header(path, text)
    found = {_HEADER: hashlib.sha256(text).hexdigest()}
    objects, last = 0, ""
    for name, source in members:
        if name == _MANIFEST:
            _compare(path, source.read(_MOST_JSON_BYTES), found, objects)
            if next(members, None) is not None:
                raise TransferError(f"{path}: there is more after {_MANIFEST}")
            return Archive(path, folder, header)
        if one := _OBJECT.fullmatch(name):
            if _sha256(source) != one[1] or one[1] <= last:
                raise TransferError(f"{path}: {name} is damaged")
            objects, last = objects + 1, one[1]
        elif name in _ROWS and name not in found:
            found[name] = copy(source, folder / _ROWS[name])
        else:
            raise TransferError(f"{path}: {name!r} is no part of an export, or is there twice")
    raise TransferError(f"{path}: the file is not whole: it ends without {_MANIFEST}")


_ROWS = {f"rows/{table.name}.jsonl": f"{table.name}.jsonl" for table in TABLES}


def copy(source: IO[bytes], to: Path) -> str:
    """Write what `source` holds to a file; its SHA-256."""
    with to.open("wb") as file:
        return _sha256(source, file)


def _sha256(source: IO[bytes], to: IO[bytes] | None = None) -> str:
    total = hashlib.sha256()
    while piece := source.read(_CHUNK_BYTES):
        total.update(piece)
        if to is not None:
            to.write(piece)
    return total.hexdigest()


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents, one after the other. Raises TransferError for what is no plain file."""
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            source = tar.extractfile(member) if member.isreg() else None
            if source is None:
                raise TransferError(f"{path}: {member.name!r} is no plain file")
            yield member.name, source
            tar.members = []  # type: ignore[attr-defined]


def _header(path: Path, text: bytes) -> Header:
    said = _object(path, _HEADER, text)
    number, revision, unfinished = (said.get(name) for name in ("format", "revision", "unfinished"))
    if isinstance(number, int) and number > FORMAT:
        raise TransferError(f"{path}: its format {number} is newer than {FORMAT}, the newest that this version knows")
    if number != FORMAT or not isinstance(revision, str) or not isinstance(unfinished, list):
        raise TransferError(f"{path}: {_HEADER} is damaged")
    return Header(revision, tuple(map(str, unfinished)))


def _compare(path: Path, text: bytes, found: dict[str, str], objects: int) -> None:
    said = _object(path, _MANIFEST, text)
    expected = said.get("sha256")
    if not isinstance(expected, dict) or set(expected) != {_HEADER, *_ROWS}:
        raise TransferError(f"{path}: {_MANIFEST} is damaged")
    for name, sha256 in expected.items():
        if found.get(name) != sha256:
            raise TransferError(f"{path}: {name} is {'damaged' if name in found else 'missing'}")
    if said.get("objects") != objects:
        raise TransferError(f"{path}: expected {said.get('objects')} objects, found {objects}")


def _object(path: Path, name: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise TransferError(f"{path}: {name} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise TransferError(f"{path}: {name} is damaged")
    return found
