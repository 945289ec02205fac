"""Pages of a list, by keyset: the cursor is the last id of the page before."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import InvalidRequestError

T = TypeVar("T")
Filters = Mapping[InstrumentedAttribute[Any], Any]


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some rows, and the cursor of the next page if there are more."""

    rows: list[T]
    next_cursor: str | None


def fetch_page(
    session: Session,
    query: Select[T],
    key: InstrumentedAttribute[Any],
    limit: int,
    cursor: str | None,
    newest_first: bool = False,
    equal: Filters | None = None,
) -> Page[T]:
    """The page after `cursor`, in order of `key` (unique; ids, which sort by age, or an event's number).

    `equal` are columns and what they must be (None: anything). Those of the table's best index are written as bounds
    of a range in the index's order. Written as equalities, which is the same, PostgreSQL may go through all rows in
    order of `key` instead, since it does not know that what it looks for was made late.
    """
    given = {column: value for column, value in (equal or {}).items() if value is not None}
    scope = _scope(key, given)
    query = query.where(*(column == value for column, value in given.items() if column not in scope))
    last = None if cursor is None else _last(key, cursor)
    query = query.where(*_range({column: given[column] for column in scope}, key, last, newest_first))
    order = [column.desc() if newest_first else column for column in (*scope, key)]
    rows = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(rows, encode_cursor(str(getattr(rows[-1], key.key))) if more else None)


def _scope(key: InstrumentedAttribute[Any], given: Filters) -> list[InstrumentedAttribute[Any]]:
    """The columns before the key in the index that serves most of the filters."""
    by_name = {column.key: column for column in given}
    names = ([column.name for column in index.columns] for index in key.class_.__table__.indexes)
    served = [found[:-1] for found in names if found[-1] == key.key and by_name.keys() >= set(found[:-1])]
    return [by_name[name] for name in max(sorted(served), key=len, default=[])]


def _range(
    scope: Filters, key: InstrumentedAttribute[Any], last: object | None, newest_first: bool
) -> list[ColumnElement[bool]]:
    """Bounds of the rows that are equal in `scope` and whose key is beyond `last`."""
    columns, values = list(scope), list(scope.values())
    bounds: list[ColumnElement[bool]] = []
    if last is not None:
        place, beyond = tuple_(*columns, key), tuple_(*values, last)
        bounds.append(place < beyond if newest_first else place > beyond)
    if columns:
        place, wanted = tuple_(*columns), tuple_(*values)
        if last is None or newest_first:
            bounds.append(place >= wanted)
        if last is None or not newest_first:
            bounds.append(place <= wanted)
    return bounds


def _last(key: InstrumentedAttribute[Any], cursor: str) -> Any:
    """The key of the last row before the page."""
    convert: Callable[[str], Any] = key.type.python_type
    try:
        last = convert(decode_cursor(cursor))
        if isinstance(last, int) and abs(last) >= 1 << 63:
            raise ValueError("not a row's number")
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError.at("/cursor", "expected next_cursor of an earlier page", "invalid_cursor") from error
    return last


def encode_cursor(last: str) -> str:
    """The cursor of what follows `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """What `encode_cursor` was given. Raises ValueError for anything else."""
    decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    if not decoded.isprintable() or len(decoded) > 100:
        raise ValueError("not a cursor")
    return decoded
