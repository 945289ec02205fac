"""Taking a project in from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from sqlalchemy import Table as SqlTable
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from service.db.queries import jobs
from service.errors import StorageError, TransferError
from service.service import Service
from service.states import FINAL_JOB_STATES, FINAL_STAGE_STATES, JobState, StageState
from service.storage import object_key
from service.transfer import queries
from service.transfer.archive import Archive, check, copy, reading
from service.transfer.rows import (
    ARTIFACTS,
    EVENTS,
    JOBS,
    MODELS,
    PROMPT_SETS,
    STAGES,
    TABLES,
    Row,
    key_of,
    late_columns,
    to_line,
)

_PAGE = 200


@dataclass(frozen=True)
class Imported:
    """What was taken in. `cancelled` are jobs that had not ended where they come from."""

    path: Path
    jobs: int
    rows: int
    rows_present: int
    objects: int
    cancelled: tuple[str, ...]


def import_project(service: Service, path: Path) -> Imported:
    """Add what the file holds to the installation: objects first, then all rows in one transaction.

    Rows that are there with the same content are left alone, so that a file may be taken in twice. Built-in prompt
    lists and base models are those of this installation. Raises TransferError for a file that is damaged or made by
    another version, or a row that is here with other content; nothing is taken in then. Raises StorageError.
    """
    with service.store.scratch() as folder:
        archive = check(path, folder)
        with service.uow.reading() as session:
            _require_revision(session, archive)
            merge = _Merge.of(session, archive)
            known = merge.compare(session)
        put = _put_objects(service, merge, folder, known.artifacts)
        try:
            found = service.uow.run(merge.insert, lambda session, _: not merge.compare(session).rows)
        except (IntegrityError, DataError) as error:
            raise TransferError(f"{path}: its rows do not fit here: {error.orig}") from error
    cancelled = tuple(job_id for job_id in archive.header.unfinished if job_id in found.jobs)
    return Imported(path, len(found.jobs), found.rows, found.rows_present, put, cancelled)


def _require_revision(session: Session, archive: Archive) -> None:
    here = queries.revision(session)
    if archive.header.revision != here:
        raise TransferError(
            f"{archive.path}: it was made at revision {archive.header.revision} of the database, and this one is at "
            f"{here}: bring the older installation up to date"
        )


@dataclass
class _Found:
    """Of a comparison or an insertion: what was new, how much was there, and which artifacts were."""

    jobs: set[str] = field(default_factory=set)
    rows: int = 0
    rows_present: int = 0
    artifacts: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Merge:
    """A file's rows as they are to be here.

    ids     what this installation calls a built-in list or base model that the file has under another id
    hidden  built-in lists of another version: kept for the jobs that used them, without their names
    """

    archive: Archive
    ids: dict[str, str]
    hidden: frozenset[str]

    @classmethod
    def of(cls, session: Session, archive: Archive) -> _Merge:
        """Raises TransferError for a prompt set whose name and version mean other prompts here."""
        ids, hidden = _known_prompt_sets(session, archive)
        here = queries.base_models(session)
        for row in archive.rows(MODELS):
            if row["name"] in here:
                ids[row["id"]] = here[row["name"]]
        return cls(archive, ids, frozenset(hidden))

    def compare(self, session: Session) -> _Found:
        """What is new. Raises TransferError for a row that is here with other content."""
        return self._merge(session, write=False)

    def insert(self, session: Session) -> _Found:
        """Insert what is new. Raises TransferError as `compare` does."""
        return self._merge(session, write=True)

    def _merge(self, session: Session, write: bool) -> _Found:
        found = _Found()
        late: list[tuple[SqlTable, list[Row]]] = []
        for table in TABLES:
            named_later = bool(late_columns(table))
            rows = self.rows(table)
            while page := list(islice(rows, _PAGE)):
                new = self._new(session, table, page, found)
                if write:
                    queries.add(session, table, new)
                    late += [(table, new)] if named_later else []
        for table, new in late:
            queries.fill(session, table, new)
        if write:
            for job_id in sorted(found.jobs.intersection(self.archive.header.unfinished)):
                message = "it had not ended where it was exported: it is cancelled here"
                jobs.add_event(session, job_id, "job.cancelled", message)
        return found

    def _new(self, session: Session, table: SqlTable, page: list[Row], found: _Found) -> list[Row]:
        """Those of the rows that are not here."""
        if table is EVENTS:  # numbered by each installation; a job that is here has its own
            new = [row for row in page if row["job_id"] in found.jobs]
        else:
            here = queries.present(session, table, page)
            new = [row for row in page if not _is_here(table, row, here.get(key_of(table, row)), self.archive.path)]
        if table is JOBS:
            found.jobs |= {row["id"] for row in new}
        if table is ARTIFACTS:
            found.artifacts |= {row["id"] for row in page} - {row["id"] for row in new}
        found.rows += len(new)
        found.rows_present += len(page) - len(new)
        return new

    def rows(self, table: SqlTable) -> Iterator[Row]:
        """A table's rows as they are to be here."""
        own = set(self.ids.values())
        for row in self.archive.rows(table, self.ids):
            if table in (PROMPT_SETS, MODELS) and row["id"] in own:
                continue
            if table is PROMPT_SETS and row["id"] in self.hidden:
                row |= {"name": None, "builtin": False}
            yield _ended(table, row)


def _known_prompt_sets(session: Session, archive: Archive) -> tuple[dict[str, str], set[str]]:
    """Ids here by ids there, and the built-in lists that are not here in that version."""
    ids: dict[str, str] = {}
    hidden: set[str] = set()
    for row in archive.rows(PROMPT_SETS):
        if row["name"] is None:
            continue
        here = queries.versions(session, row["name"])
        same = [
            one for one in here if one.sha256 == row["sha256"] and (row["builtin"] or one.version == row["version"])
        ]
        if same:
            ids[row["id"]] = same[0].id
        elif row["builtin"]:
            hidden.add(row["id"])
        elif any(one.version == row["version"] for one in here):
            raise TransferError(
                f"{archive.path}: the prompt set {row['name']!r}, version {row['version']}, is here with other prompts"
            )
    return ids, hidden


def _is_here(table: SqlTable, row: Row, here: Row | None, path: Path) -> bool:
    """Whether the row is here. Raises TransferError where it is with other content."""
    if here is None:
        return False
    if to_line(here) != to_line(row):
        different = sorted(name for name in row if row[name] != here[name])
        name = " ".join(map(str, key_of(table, row)))
        raise TransferError(f"{path}: {name} of {table.name} is here with other content: {', '.join(different)}")
    return True


def _ended(table: SqlTable, row: Row) -> Row:
    """The row of a job or stage that goes on nowhere: what had not ended is cancelled, and checkpoints stay behind."""
    if table is JOBS and row["state"] not in FINAL_JOB_STATES:
        times = (row[name] for name in ("created_at", "started_at", "pause_requested_at", "cancel_requested_at"))
        last = max(time for time in times if time is not None)
        return row | {"state": JobState.CANCELLED.value, "finished_at": last}
    if table is STAGES:
        row = row | {"checkpoint_key": None, "checkpoint_sha256": None, "checkpoint_at": None}
        if row["state"] not in FINAL_STAGE_STATES:
            free = {"lease_owner": None, "lease_expires_at": None, "finished_at": row["started_at"]}
            return row | free | {"state": StageState.CANCELLED.value}
    return row


def _put_objects(service: Service, merge: _Merge, folder: Path, known: set[str]) -> int:
    """Store the objects of all artifacts but the known ones; how many there were. Raises TransferError, StorageError;
    what was stored is removed again then."""
    stored: list[str] = []
    rows = merge.rows(ARTIFACTS)
    row = next(rows, None)
    try:
        with reading(merge.archive.path):
            for sha256, source in merge.archive.objects():
                wanted = []
                while row is not None and row["sha256"] == sha256:
                    wanted += [row] if row["id"] not in known else []
                    row = next(rows, None)
                if wanted:
                    _put(service, merge.archive.path, wanted, source, folder / "object", stored)
        if row is not None:
            raise TransferError(f"{merge.archive.path}: the object of {row['id']} is missing")
    except (TransferError, StorageError):
        for key in stored:
            with suppress(StorageError):
                service.store.remove(key)
        raise
    return len(stored)


def _put(service: Service, path: Path, rows: list[Row], source: IO[bytes], file: Path, stored: list[str]) -> None:
    """Store an object for these artifacts."""
    sha256 = copy(source, file)
    for row in rows:
        key = object_key(row["job_id"], row["stage_id"], row["slot"], row["sha256"])
        if sha256 != row["sha256"] or key != row["key"] or file.stat().st_size != row["size_bytes"]:
            raise TransferError(f"{path}: {row['id']} does not fit its object")
        stored.append(service.store.put(row["job_id"], row["stage_id"], row["slot"], file).key)
