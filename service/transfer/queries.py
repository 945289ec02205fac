"""Queries over whole tables, for moving a project. They go by columns, not by classes: a new column is moved, too."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import JSON, ColumnElement, Select, bindparam, insert, select, text, tuple_, update
from sqlalchemy import Table as SqlTable
from sqlalchemy.orm import Session

from service.db.tables import Job, Model, Pair, PromptSet, Sample
from service.ids import IdKind
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
    """The migration that the database is at."""
    return str(session.scalars(text("SELECT version_num FROM alembic_version")).one())


def rows(session: Session, table: SqlTable, where: ColumnElement[bool] | None) -> Iterator[Row]:
    """A table's rows, always in the same order."""
    query = select(table).order_by(*_order(table))
    if where is not None:
        query = query.where(where)
    for row in session.execute(query, execution_options={"yield_per": _PAGE}).mappings():
        yield as_moved(table, dict(row))


def _order(table: SqlTable) -> list[ColumnElement[Any]]:
    if table is ARTIFACTS:
        return [table.c.sha256, table.c.id]  # as their objects
    if table is EVENTS:
        return [table.c.job_id, table.c.id]
    return list(table.primary_key.columns)


def of_jobs(table: SqlTable, job_ids: Collection[str]) -> ColumnElement[bool] | None:
    """Which rows are these jobs'; None for a table whose rows are nobody's."""
    if table is JOBS:
        return table.c.id.in_(job_ids)
    if "job_id" in table.c:
        return table.c.job_id.in_(job_ids)
    if table.name == "scores":
        return table.c.sample_id.in_(select(Sample.id).where(Sample.job_id.in_(job_ids)))
    if table.name == "stage_dependencies":
        return table.c.stage_id.in_(select(STAGES.c.id).where(STAGES.c.job_id.in_(job_ids)))
    return None


def with_their_sources(session: Session, job_ids: Collection[str]) -> set[str]:
    """These jobs, and those whose samples, pairs or models they were made from, and so on."""
    found: set[str] = set()
    fresh = set(job_ids)
    while fresh:
        found |= fresh
        fresh = _named_by(session, fresh) - found
    return found


def _named_by(session: Session, job_ids: Collection[str]) -> set[str]:
    """The jobs that rows of these jobs name, or whose rows they name."""
    named: set[str | None] = set()
    for table in TABLES:
        ours = of_jobs(table, job_ids) if table is JOBS or "job_id" in table.c else None
        if ours is None:
            continue
        for column in columns(table):
            target = target_of(column)
            if target is None or column.name == "job_id" or not ("job_id" in target.c or target is JOBS):
                continue
            named_row = target.alias()  # a table may name its own rows
            owner = named_row.c.id if target is JOBS else named_row.c.job_id
            query = select(owner).distinct().select_from(table).join(named_row, named_row.c.id == column)
            named |= set(session.scalars(query.where(ours)))
    for spec in session.scalars(select(Job.spec).where(Job.id.in_(job_ids))):
        named |= _owners(session, set(_ID.findall(json.dumps(spec))))
    return {job_id for job_id in named if job_id is not None}


def _owners(session: Session, ids: Collection[str]) -> set[str | None]:
    """The jobs of these ids that there are."""
    queries: tuple[Select[Any], ...] = (
        select(Job.id).where(Job.id.in_(ids)),
        select(Pair.job_id).where(Pair.id.in_(ids)),
        select(Sample.job_id).where(Sample.id.in_(ids)),
        select(Model.job_id).where(Model.id.in_(ids)),
    )
    return {job_id for query in queries for job_id in session.scalars(query)} if ids else set()


def parents(session: Session, job_ids: Collection[str]) -> set[str]:
    """The models that these jobs' models were trained from."""
    query = select(Model.parent_id).where(Model.job_id.in_(job_ids), Model.parent_id.is_not(None))
    return {model_id for model_id in session.scalars(query) if model_id is not None}


def base_models(session: Session) -> dict[str, str]:
    """The ids of this installation's base models, by name."""
    query = select(Model.name, Model.id).where(Model.name.is_not(None))
    return {str(row.name): row.id for row in session.execute(query)}


def versions(session: Session, name: str) -> Sequence[PromptSet]:
    """All versions of the prompt set of that name."""
    return session.scalars(select(PromptSet).where(PromptSet.name == name).order_by(PromptSet.version)).all()


def present(session: Session, table: SqlTable, wanted: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """Those of the rows, by primary key, that are there, as they are there."""
    keys = [key_of(table, row) for row in wanted]
    query = select(table).where(tuple_(*table.primary_key.columns).in_(keys))
    found = (as_moved(table, dict(row)) for row in session.execute(query).mappings())
    return {key_of(table, row): row for row in found}


def add(session: Session, table: SqlTable, new: Sequence[Row]) -> None:
    """Insert rows; their late columns stay empty."""
    if not new:
        return
    late = late_columns(table)
    values = {
        column.name: bindparam(column.name, type_=JSON(none_as_null=True) if _is_json(column) else column.type)
        for column in columns(table)
    }
    session.execute(insert(table).values(values), [{**row, **dict.fromkeys(late)} for row in new])


def _is_json(column: ColumnElement[Any]) -> bool:
    return isinstance(column.type, JSON)


def fill(session: Session, table: SqlTable, new: Sequence[Mapping[str, Any]]) -> None:
    """Give rows that `add` has inserted what their late columns name."""
    late = late_columns(table)
    for row in new:
        named = {name: row[name] for name in late if row[name] is not None}
        if named:
            session.execute(update(table).where(table.c.id == row["id"]).values(named))
