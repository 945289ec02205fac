"""Statements on many rows: lookups by id and inserts.

Many values are passed as one JSON text, so that their number changes neither the number of statements nor that of bound
variables, which SQLite limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    Boolean,
    ColumnElement,
    Insert,
    String,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal_column,
    select,
    true,
)
from sqlalchemy import Table as SqlTable
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased, defer
from sqlalchemy.sql.functions import GenericFunction

from service.db.tables import Job, Table
from service.errors import NotFoundError
from service.ids import IdKind, expect

T = TypeVar("T", bound=Table)

UNSYNCED: Mapping[str, Any] = {"synchronize_session": False}
"""Execution options of bulk updates and deletes that do not update the objects of the session."""
Computed = Callable[[Mapping[str, ColumnElement[Any]]], dict[str, ColumnElement[Any]]]
"""Columns that the database computes for each inserted row, from the given ones."""
_ROWS = "rows"


class json_texts(GenericFunction[str]):  # noqa: N801, RUF100 - named like an SQL function
    """The texts of a JSON array as rows with the column `value`."""

    type = String()
    inherit_cache = True


@compiles(json_texts, "sqlite")
def _sqlite(element: json_texts, compiler: Any, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(json_texts, "postgresql")
def _postgresql(element: json_texts, compiler: Any, **options: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(element.clauses, **options)} AS JSON))"


def is_any_of(
    id_column: ColumnElement[str] | InstrumentedAttribute[str] | InstrumentedAttribute[str | None], ids: Iterable[str]
) -> ColumnElement[bool]:
    """The column has one of these ids. The condition has one bound variable, regardless of their number."""
    texts = json_texts(bindparam(None, json.dumps(sorted(set(ids))), String)).table_valued(column("value", String))
    return id_column.in_(select(texts.c.value))


@cache  # building it takes longer than reading a row
def is_kept(table: type[Table]) -> ColumnElement[bool]:
    """The row is not a deleted job, and belongs to none."""
    if table is Job:
        return Job.deleted_at.is_(None)
    if "job_id" not in table.__table__.c:
        return true()
    owner = aliased(Job)
    deleted = select(owner.id).where(owner.id == table.__table__.c.job_id, owner.deleted_at.is_not(None))
    # with an offset, PostgreSQL makes no join of it; it expects one row of that join, whatever their number, and would
    # compare each row with all ids of `is_any_of`
    return ~deleted.offset(literal_column("0")).exists()


def without_texts() -> tuple[Any, ...]:
    """Options of a query for jobs that leave out their requests and results, which can have megabytes.

    They are read when they are used, as long as the session is open.
    """
    return defer(Job.spec), defer(Job.result)


def get_row(session: Session, table: type[T], kind: IdKind, row_id: str) -> T:
    """The row with this id.

    Raises:
        NotFoundError: The id has another kind, no such row exists, or its job is deleted.
    """
    id_column = table.__table__.c.id
    row = session.scalar(select(table).where(id_column == expect(kind, row_id), is_kept(table)))
    if row is None:
        raise NotFoundError(f"there is no {kind.noun} {row_id}")
    return row


def select_by_ids(
    session: Session, table: type[T], id_column: InstrumentedAttribute[str], ids: Iterable[str], *order: Any
) -> list[T]:
    """The rows whose column has one of these ids, without those of deleted jobs, in the given order."""
    query = select(table).where(is_any_of(id_column, ids), is_kept(table))
    return list(session.scalars(query.order_by(*order)))


def insert_rows(session: Session, table: SqlTable, rows: Sequence[Mapping[str, Any]], computed: Computed) -> None:
    """Insert rows with one statement.

    For integers, texts and JSON. SQLite can change the last bit of other numbers.

    Args:
        session: The transaction.
        table: The table.
        rows: At least one row, all with the same names. A name without a column is a boolean for `computed`.
        computed: The other columns.
    """
    session.flush()
    statement = _insert_statement(session.get_bind().dialect.name, table, tuple(rows[0]), computed)
    session.execute(statement, {_ROWS: json.dumps(rows)})


@lru_cache(maxsize=16)  # since building a statement takes about as long as running it
def _insert_statement(dialect: str, table: SqlTable, names: tuple[str, ...], computed: Computed) -> Insert:
    types = {name: table.c[name].type if name in table.c else Boolean() for name in names}
    parameter = bindparam(_ROWS, type_=String)

    # 1. the rows as a table
    values: dict[str, ColumnElement[Any]]
    if dialect == "postgresql":
        typed = [column(name, type_) for name, type_ in types.items()]
        record = func.json_to_recordset(cast(parameter, JSON)).table_valued(*typed).render_derived(with_types=True)
        values = {name: record.c[name] for name in names}
    else:
        elements = func.json_each(parameter).table_valued(column("value", String))
        values = {name: func.json_extract(elements.c.value, f"$.{name}") for name in names}

    # 2. the inserted columns
    inserted = {name: value for name, value in values.items() if name in table.c} | computed(values)
    return insert(table).from_select(list(inserted), select(*inserted.values()))
