"""Import of a project from an archive."""

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
    """A finished import: its new contents, existing rows, and the jobs imported as cancelled."""

    path: Path
    jobs: int
    rows: int
    rows_present: int
    objects: int
    cancelled: tuple[str, ...]


def import_project(service: Service, path: Path) -> Imported:
    """Import an archive: objects first, then all rows in one transaction.

    Rows that exist with the same content are skipped, so that an archive can be imported twice. Built-in prompt lists
    and base models are mapped to those of this installation. On failure nothing is imported.

    Args:
        service: The installation.
        path: The archive.

    Raises:
        TransferError: The archive is damaged, has another version, or conflicts with existing rows.
        StorageError: An object cannot be stored.
    """
    with service.store.scratch() as folder:
        # 1. verify the archive, and compare its rows with those of the database
        archive = check(path, folder)
        with service.uow.reading() as session:
            _require_revision(session, archive)
            merge = _Merge.of(session, archive)
            existing = merge.compare(session)

        # 2. objects, then rows
        objects = _put_objects(service, merge, folder, existing.artifacts)
        try:
            changes = service.uow.run(merge.insert, lambda session, _: not merge.compare(session).rows)
        except (IntegrityError, DataError) as error:
            raise TransferError(f"{path}: the database refuses its rows: {error.orig}") from error

    cancelled = tuple(job_id for job_id in archive.header.unfinished if job_id in changes.jobs)
    return Imported(path, len(changes.jobs), changes.rows, changes.rows_present, objects, cancelled)


def _require_revision(session: Session, archive: Archive) -> None:
    current = queries.revision(session)
    if archive.header.revision != current:
        raise TransferError(
            f"{archive.path}: expected an archive of database revision {current}, got {archive.header.revision}: "
            "migrate the older installation"
        )


@dataclass
class _Changes:
    """The changes of an import: new jobs, the numbers of new and existing rows, and the existing artifacts."""

    jobs: set[str] = field(default_factory=set)
    rows: int = 0
    rows_present: int = 0
    artifacts: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Merge:
    """The rows of an archive, adapted to this installation.

    Attributes:
        archive: The archive.
        ids: Ids of this installation for the archive's built-in prompt lists and base models, by id in the archive.
        hidden: Built-in lists of another version. They are imported for their jobs, without their names.
    """

    archive: Archive
    ids: dict[str, str]
    hidden: frozenset[str]

    @classmethod
    def of(cls, session: Session, archive: Archive) -> _Merge:
        """The merge of an archive. Raises TransferError if a prompt set exists with other prompts."""
        ids, hidden = _match_prompt_sets(session, archive)
        base_models = queries.base_models(session)
        for row in archive.rows(MODELS):
            if row["name"] in base_models:
                ids[row["id"]] = base_models[row["name"]]
        return cls(archive, ids, frozenset(hidden))

    def compare(self, session: Session) -> _Changes:
        """The changes of an import. Raises TransferError for a row that exists with other content."""
        return self._merge(session, write=False)

    def insert(self, session: Session) -> _Changes:
        """Insert the new rows. Raises TransferError as `compare` does."""
        return self._merge(session, write=True)

    def _merge(self, session: Session, write: bool) -> _Changes:
        # 1. new rows, without their references to later rows
        changes = _Changes()
        late: list[tuple[SqlTable, list[Row]]] = []
        for table in TABLES:
            has_late_columns = bool(late_columns(table))
            rows = self.rows(table)
            while page := list(islice(rows, _PAGE)):
                new = self._new_rows(session, table, page, changes)
                if write:
                    queries.add(session, table, new)
                    late += [(table, new)] if has_late_columns else []

        # 2. these references
        for table, new in late:
            queries.fill(session, table, new)

        # 3. deleted jobs, which the new rows may reference
        deleted = queries.deleted(session, [row["id"] for row in self.archive.rows(JOBS)])
        if deleted:
            raise TransferError(
                f"{self.archive.path}: {min(deleted)} was deleted here, and its rows are not removed yet "
                "(DFUSION_COLLECT_AFTER_SECONDS)"
            )

        # 4. the bytes of new jobs, and the end of those that are imported as cancelled
        if write:
            queries.count_bytes(session, changes.jobs)
            for job_id in sorted(changes.jobs.intersection(self.archive.header.unfinished)):
                message = "the job had not ended when it was exported: imported as cancelled"
                jobs.add_event(session, job_id, "job.cancelled", message)
        return changes

    def _new_rows(self, session: Session, table: SqlTable, page: list[Row], changes: _Changes) -> list[Row]:
        """The rows of a page that do not exist. Adds them to `changes`."""
        if table is EVENTS:  # numbered by each installation, so only the events of new jobs are imported
            new = [row for row in page if row["job_id"] in changes.jobs]
        else:
            existing = queries.present(session, table, page)
            new = [row for row in page if not _exists(table, row, existing.get(key_of(table, row)), self.archive.path)]

        if table is JOBS:
            changes.jobs |= {row["id"] for row in new}
        if table is ARTIFACTS:
            new_ids = {row["id"] for row in new}
            changes.artifacts |= {row["id"] for row in page} - new_ids
        changes.rows += len(new)
        changes.rows_present += len(page) - len(new)
        return new

    def rows(self, table: SqlTable) -> Iterator[Row]:
        """The rows of a table, adapted to this installation."""
        mapped = set(self.ids.values())
        for row in self.archive.rows(table, self.ids):
            if table in (PROMPT_SETS, MODELS) and row["id"] in mapped:
                continue
            if table is PROMPT_SETS and row["id"] in self.hidden:
                row |= {"name": None, "builtin": False}
            yield _as_ended(table, row)


def _match_prompt_sets(session: Session, archive: Archive) -> tuple[dict[str, str], set[str]]:
    """Match the named prompt sets of an archive with those of the database.

    Returns:
        The ids of existing sets with the same prompts, by id in the archive; and the ids of built-in lists of a version
        that does not exist here.

    Raises:
        TransferError: A prompt set exists with the same name and version and other prompts.
    """
    ids: dict[str, str] = {}
    hidden: set[str] = set()
    for row in archive.rows(PROMPT_SETS):
        if row["name"] is None:
            continue

        same_name = queries.versions(session, row["name"])
        same_version = [version for version in same_name if version.version == row["version"]]
        candidates = same_name if row["builtin"] else same_version
        match = next((candidate for candidate in candidates if candidate.sha256 == row["sha256"]), None)
        if match is not None:
            ids[row["id"]] = match.id
        elif row["builtin"]:
            hidden.add(row["id"])
        elif same_version:
            raise TransferError(
                f"{archive.path}: the prompt set {row['name']!r}, version {row['version']}, exists with other prompts"
            )
    return ids, hidden


def _exists(table: SqlTable, row: Row, existing: Row | None, path: Path) -> bool:
    """Whether the row exists. Raises TransferError if it exists with other content."""
    if existing is None:
        return False
    if to_line(existing) != to_line(row):
        different = sorted(name for name in row if row[name] != existing[name])
        key = " ".join(map(str, key_of(table, row)))
        raise TransferError(f"{path}: {key} of {table.name} exists with other content: {', '.join(different)}")
    return True


def _as_ended(table: SqlTable, row: Row) -> Row:
    """The row, with unfinished jobs and stages as cancelled, and without checkpoints, which are not exported."""
    if table is JOBS and row["state"] not in FINAL_JOB_STATES:
        times = (row[name] for name in ("created_at", "started_at", "pause_requested_at", "cancel_requested_at"))
        last = max(time for time in times if time is not None)
        return row | {"state": JobState.CANCELLED.value, "finished_at": last}

    if table is STAGES:
        row = row | {"checkpoint_key": None, "checkpoint_sha256": None, "checkpoint_at": None, "is_counted": True}
        if row["state"] not in FINAL_STAGE_STATES:
            free = {"lease_owner": None, "lease_expires_at": None, "finished_at": row["started_at"]}
            return row | free | {"state": StageState.CANCELLED.value}
    return row


def _put_objects(service: Service, merge: _Merge, folder: Path, existing: set[str]) -> int:
    """Store the objects of new artifacts. On failure all of them are removed again.

    Args:
        service: The installation.
        merge: The archive.
        folder: A folder for temporary files.
        existing: The ids of artifacts that exist.

    Returns:
        The number of stored objects.

    Raises:
        TransferError: An object is missing or does not match its artifact.
        StorageError: An object cannot be stored.
    """
    stored: list[str] = []
    rows = merge.rows(ARTIFACTS)
    row = next(rows, None)
    try:
        # rows and objects are both sorted by SHA-256
        with reading(merge.archive.path):
            for sha256, source in merge.archive.objects():
                new = []
                while row is not None and row["sha256"] == sha256:
                    new += [row] if row["id"] not in existing else []
                    row = next(rows, None)
                if new:
                    _put(service, merge.archive.path, new, source, folder / "object", stored)

        if row is not None:
            raise TransferError(f"{merge.archive.path}: the object of {row['id']} is missing")

    except (TransferError, StorageError):
        for key in stored:
            with suppress(StorageError):
                service.store.remove(key)
        raise
    return len(stored)


def _put(service: Service, path: Path, rows: list[Row], source: IO[bytes], file: Path, stored: list[str]) -> None:
    """Store an object for these artifacts and append its keys to `stored`."""
    sha256 = copy(source, file)
    for row in rows:
        key = object_key(row["job_id"], row["stage_id"], row["slot"], row["sha256"])
        if sha256 != row["sha256"] or key != row["key"] or file.stat().st_size != row["size_bytes"]:
            raise TransferError(f"{path}: {row['id']} does not match its object")
        stored.append(service.store.put(row["job_id"], row["stage_id"], row["slot"], file).key)
