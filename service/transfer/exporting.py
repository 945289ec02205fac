"""Export of a project into an archive."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, or_
from sqlalchemy import Table as SqlTable
from sqlalchemy.orm import Session

from service.db.queries import jobs
from service.ids import IdKind
from service.service import Service
from service.states import FINAL_JOB_STATES
from service.transfer import queries
from service.transfer.archive import ArchiveWriter, Header, writing
from service.transfer.rows import JOBS, MODEL_ALIASES, MODELS, PROMPT_SETS, TABLES, read_lines, to_line

_MENTION = re.compile(rf"(?:{IdKind.MODEL}|{IdKind.PROMPT_SET})_[0-9a-z]{{26}}")
_SHARED = (PROMPT_SETS, MODELS, MODEL_ALIASES)
"""Tables whose rows are exported because other rows reference them."""


@dataclass(frozen=True)
class Exported:
    """A finished export: its contents, and the jobs that had not ended."""

    path: Path
    jobs: int
    rows: int
    objects: int
    object_bytes: int
    unfinished: tuple[str, ...]


def export_project(service: Service, path: Path, job_ids: Sequence[str] = ()) -> Exported:
    """Export the installation, or some jobs and their sources, into a new archive.

    The rows are one view of the database; the service can continue to run. On failure no file is created.

    Args:
        service: The installation.
        path: The archive.
        job_ids: The jobs; empty is all.

    Raises:
        NotFoundError: A job does not exist.
        StorageError: An object cannot be read.
        OSError: The archive cannot be written.
    """
    with service.store.scratch() as folder:
        # 1. all rows, into one file per table
        with service.uow.reading() as session:
            header = _RowWriter(session, folder, job_ids).write()
        counts = {table.name: _count_lines(folder / table.name) for table in TABLES}

        # 2. the archive
        with writing(path) as archive:
            archive.add_header(header)
            for table in TABLES:
                archive.add_rows(table.name, folder / table.name)
            _add_objects(service, archive, folder / "artifacts")
            archive.add_manifest()

    return Exported(
        path=path,
        jobs=counts["jobs"],
        rows=sum(counts.values()),
        objects=archive.objects,
        object_bytes=archive.object_bytes,
        unfinished=header.unfinished,
    )


class _RowWriter:
    """Writes the rows of one view of the database into files, one per table."""

    def __init__(self, session: Session, folder: Path, job_ids: Sequence[str]) -> None:
        self._session = session
        self._folder = folder
        known_ids = [jobs.get(session, job_id).id for job_id in job_ids]
        self._jobs = queries.with_their_sources(session, known_ids) if known_ids else None
        self._mentioned: set[str] = set()
        self._unfinished: list[str] = []

    def write(self) -> Header:
        """Write all tables; the shared ones last, when it is known which of their rows are referenced."""
        owned = [table for table in TABLES if table not in _SHARED]
        for table in (*owned, *_SHARED):
            self._write_table(table)
        return Header(queries.revision(self._session), tuple(self._unfinished))

    def _write_table(self, table: SqlTable) -> None:
        where = queries.kept(self._session, table) if self._jobs is None else self._condition(table, self._jobs)
        with (self._folder / table.name).open("w", encoding="utf-8", newline="\n") as file:
            for row in queries.rows(self._session, table, where):
                line = to_line(row)
                file.write(line + "\n")
                if self._jobs is not None:
                    self._mentioned |= set(_MENTION.findall(line))
                if table is JOBS and row["state"] not in FINAL_JOB_STATES:
                    self._unfinished.append(row["id"])

    def _condition(self, table: SqlTable, job_ids: set[str]) -> ColumnElement[bool] | None:
        """The condition for the rows that belong to these jobs or that they reference."""
        mentioned = self._mentioned | queries.parents(self._session, job_ids)
        if table is PROMPT_SETS:
            return table.c.id.in_(mentioned)
        if table is MODELS:
            return or_(table.c.job_id.in_(job_ids), table.c.id.in_(mentioned))
        if table is MODEL_ALIASES:
            return table.c.model_id.in_(mentioned)
        return queries.of_jobs(table, job_ids)


def _count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _add_objects(service: Service, archive: ArchiveWriter, artifacts: Path) -> None:
    """Add the object of each artifact once. The rows are sorted by SHA-256."""
    last = ""
    for row in read_lines(artifacts, {}):
        if row["sha256"] != last:
            last = row["sha256"]
            with service.store.borrow(row["key"], last) as file:
                archive.add_object(last, file)
