"""Queries over whole tables, for transfers. They use the tables' columns, so that new columns are included."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from sqlalchemy import JSON, ColumnElement, Select, bindparam, func, insert, select, text, true, tuple_, update
from sqlalchemy import Table as SqlTable
from sqlalchemy.orm import Session

from service.db.queries.rows import UNSYNCED, is_any_of
from service.db.tables import IS_DELETED, Artifact, Job, JobSource, Model, Pair, PreferenceTest, PromptSet, Sample
from service.ids import IdKind
from service.states import CACHE_KINDS
from service.transfer.rows import (
    ARTIFACTS,
    EVENTS,
    JOBS,
    STAGES,
    TABLES,
    Row,
    as_moved,
    columns,
    key_of,
    late_columns,
    target_of,
)

_PAGE = 500
_ID = re.compile(rf"(?:{'|'.join((IdKind.JOB, IdKind.PAIR, IdKind.SAMPLE, IdKind.MODEL))})_[0-9a-z]{{26}}")


def revision(session: Session) -> str:
    """The revision of the database."""
    return str(session.scalars(text("SELECT version_num FROM alembic_version")).one())


def rows(session: Session, table: SqlTable, where: ColumnElement[bool] | None) -> Iterator[Row]:
    """The rows of a table, in a fixed order."""
    query = select(table).order_by(*_order(table))
    if where is not None:
        query = query.where(where)
    for row in session.execute(query, execution_options={"yield_per": _PAGE}).mappings():
        yield as_moved(table, row)


def _order(table: SqlTable) -> list[ColumnElement[Any]]:
    if table is ARTIFACTS:
        return [table.c.sha256, table.c.id]  # the order of their objects
    if table is EVENTS:
        return [table.c.job_id, table.c.id]
    return list(table.primary_key.columns)


def of_jobs(table: SqlTable, job_ids: Collection[str]) -> ColumnElement[bool] | None:
    """The condition for the rows of these jobs; None for a table whose rows belong to no job."""
    if table is JOBS:
        return table.c.id.in_(job_ids)
    if "job_id" in table.c:
        return table.c.job_id.in_(job_ids)
    if table.name == "scores":
        return table.c.sample_id.in_(select(Sample.id).where(Sample.job_id.in_(job_ids)))
    if table.name == "pair_verdicts":
        return table.c.pair_id.in_(select(Pair.id).where(Pair.job_id.in_(job_ids)))
    if table.name == "stage_dependencies":
        return table.c.stage_id.in_(select(STAGES.c.id).where(STAGES.c.job_id.in_(job_ids)))
    if "test_id" in table.c:
        return table.c.test_id.in_(select(PreferenceTest.id).where(PreferenceTest.job_id.in_(job_ids)))
    return None


def kept(session: Session, table: SqlTable) -> ColumnElement[bool] | None:
    """The condition for the rows that belong to no deleted job; None if there is no deleted job.

    Jobs that are deleted with a job that they use count as deleted.
    """
    deleted = set(session.scalars(select(Job.id).where(text(IS_DELETED))))
    caches = select(Job.id).join(JobSource, JobSource.job_id == Job.id).where(Job.kind.in_(CACHE_KINDS))
    deleted |= set(session.scalars(caches.where(is_any_of(JobSource.source_id, deleted)))) if deleted else set()
    condition = of_jobs(table, deleted) if deleted else None
    # a model of the catalogue belongs to no job
    return None if condition is None else func.coalesce(~condition, true())


def deleted(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that are deleted and whose rows are not removed yet."""
    return set(session.scalars(select(Job.id).where(is_any_of(Job.id, job_ids), text(IS_DELETED))))


def with_their_sources(session: Session, job_ids: Collection[str]) -> set[str]:
    """These jobs, and transitively the jobs whose samples, pairs or models they use."""
    closure: set[str] = set()
    added = set(job_ids)
    while added:
        closure |= added
        added = _referenced_jobs(session, added) - closure
    return closure


def _referenced_jobs(session: Session, job_ids: Collection[str]) -> set[str]:
    """The jobs that the rows and specs of these jobs reference, directly or by one of their rows."""
    referenced: set[str | None] = set()

    # 1. by foreign keys
    for table in TABLES:
        condition = of_jobs(table, job_ids) if table is JOBS or "job_id" in table.c else None
        if condition is None:
            continue
        for column in columns(table):
            target = target_of(column)
            if target is None or column.key == "job_id" or not ("job_id" in target.c or target is JOBS):
                continue
            target_row = target.alias()  # a table can reference itself
            owner = target_row.c.id if target is JOBS else target_row.c.job_id
            query = select(owner).distinct().select_from(table).join(target_row, target_row.c.id == column)
            referenced |= set(session.scalars(query.where(condition)))

    # 2. by ids in specs
    for spec in session.scalars(select(Job.spec).where(Job.id.in_(job_ids))):
        referenced |= _owners(session, set(_ID.findall(json.dumps(spec))))
    return {job_id for job_id in referenced if job_id is not None}


def _owners(session: Session, ids: Collection[str]) -> set[str | None]:
    """The jobs that these jobs, pairs, samples and models belong to. Unknown ids are left out."""
    if not ids:
        return set()

    queries: tuple[Select[Any], ...] = (
        select(Job.id).where(Job.id.in_(ids)),
        select(Pair.job_id).where(Pair.id.in_(ids)),
        select(Sample.job_id).where(Sample.id.in_(ids)),
        select(Model.job_id).where(Model.id.in_(ids)),
    )
    return set(chain.from_iterable(session.scalars(query) for query in queries))


def parents(session: Session, job_ids: Collection[str]) -> set[str]:
    """The parents of the models of these jobs."""
    query = select(Model.parent_id).where(Model.job_id.in_(job_ids), Model.parent_id.is_not(None))
    return {model_id for model_id in session.scalars(query) if model_id is not None}


def base_models(session: Session) -> dict[str, str]:
    """The ids of the base models, by name."""
    query = select(Model.name, Model.id).where(Model.name.is_not(None))
    return {str(row.name): row.id for row in session.execute(query)}


def versions(session: Session, name: str) -> Sequence[PromptSet]:
    """All versions of the prompt set with this name."""
    return session.scalars(select(PromptSet).where(PromptSet.name == name).order_by(PromptSet.version)).all()


def present(session: Session, table: SqlTable, rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """The existing rows with the primary keys of `rows`, by primary key."""
    keys = [key_of(table, row) for row in rows]
    query = select(table).where(tuple_(*table.primary_key.columns).in_(keys))
    existing = (as_moved(table, row) for row in session.execute(query).mappings())
    return {key_of(table, row): row for row in existing}


def add(session: Session, table: SqlTable, new: Sequence[Row]) -> None:
    """Insert rows with their late columns as NULL."""
    if not new:
        return

    late = late_columns(table)
    values = {
        column.key: bindparam(column.key, type_=JSON(none_as_null=True) if _is_json(column) else column.type)
        for column in columns(table)
    }
    session.execute(insert(table).values(values), [{**row, **dict.fromkeys(late)} for row in new])


def _is_json(column: ColumnElement[Any]) -> bool:
    return isinstance(column.type, JSON)


def count_bytes(session: Session, job_ids: Collection[str]) -> None:
    """Set the bytes that these jobs store, from their artifacts."""
    total = select(func.coalesce(func.sum(Artifact.size_bytes), 0)).where(Artifact.job_id == Job.id).scalar_subquery()
    query = update(Job).where(is_any_of(Job.id, job_ids)).values(storage_bytes=total)
    session.execute(query, execution_options=UNSYNCED)


def fill(session: Session, table: SqlTable, new: Sequence[Mapping[str, Any]]) -> None:
    """Set the late columns of rows that `add` has inserted."""
    late = late_columns(table)
    for row in new:
        references = {name: row[name] for name in late if row[name] is not None}
        if references:
            session.execute(update(table).where(table.c.id == row["id"]).values(references))
