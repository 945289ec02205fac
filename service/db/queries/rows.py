"""Lookups by id, which all tables share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.db.tables import Table
from service.errors import NotFoundError
from service.ids import IdKind, expect

T = TypeVar("T", bound=Table)

UNSYNCED: Mapping[str, Any] = {"synchronize_session": False}
"""Execution options of bulk updates and deletes that do not update the objects of the session."""
_MAX_IDS = 1000
"""Ids of one statement, within the limits of all databases."""


def get_row(session: Session, table: type[T], kind: IdKind, row_id: str) -> T:
    """The row with this id.

    Raises:
        NotFoundError: The id has another kind, or no such row exists.
    """
    row = session.get(table, expect(kind, row_id))
    if row is None:
        raise NotFoundError(f"there is no {kind.noun} {row_id}")
    return row


def select_by_ids(
    session: Session, table: type[T], column: InstrumentedAttribute[str], ids: Iterable[str], *order: Any
) -> Iterator[T]:
    """The rows whose column has one of these ids, in batches of ids. `order` is the order within a batch."""
    distinct = sorted(set(ids))
    for start in range(0, len(distinct), _MAX_IDS):
        batch = distinct[start : start + _MAX_IDS]
        yield from session.scalars(select(table).where(column.in_(batch)).order_by(*order))
