"""Keyset pagination: the cursor is the last key of the previous page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import InvalidRequestError

T = TypeVar("T")
ColumnValues = Mapping[InstrumentedAttribute[Any], Any]


@dataclass(frozen=True)
class Page(Generic[T]):
    """The rows of a page, and the cursor of the next page; None on the last page."""

    rows: list[T]
    next_cursor: str | None


def fetch_page(
    session: Session,
    query: Select[T],
    key: InstrumentedAttribute[Any],
    limit: int,
    cursor: str | None,
    newest_first: bool = False,
    equal: ColumnValues | None = None,
) -> Page[T]:
    """Fetch the page after `cursor`, in order of `key`.

    Filters by columns of the table's best index become bounds of a range in the order of the index. As equalities they
    mean the same, but PostgreSQL may then scan all rows in the order of `key`.

    Args:
        session: A view of the database.
        query: Selects the rows.
        key: A unique column: an id, which sorts by age, or the number of an event.
        limit: The maximum number of rows.
        cursor: The cursor of the previous page; None for the first page.
        newest_first: Descending order of `key`.
        equal: Filters, as columns and their values. A list matches any of its values; None and [] match all.

    Raises:
        InvalidRequestError: The cursor is invalid.
    """
    # 1. filters without an index
    values = {}
    for column, value in (equal or {}).items():
        if isinstance(value, list) and len(value) > 1:
            query = query.where(column.in_(value))
        elif value is not None and value != []:
            values[column] = value[0] if isinstance(value, list) else value
    indexed = _indexed_filters(key, values)
    query = query.where(*(column == value for column, value in values.items() if column not in indexed))

    # 2. filters with an index, and the rows after the cursor
    last = None if cursor is None else _last(key, cursor)
    bounds = _range({column: values[column] for column in indexed}, key, last, newest_first)
    order = [column.desc() if newest_first else column for column in (*indexed, key)]

    # 3. one row more than the page, which shows whether there is a next page
    rows = list(session.scalars(query.where(*bounds).order_by(*order).limit(limit + 1)))
    if len(rows) <= limit:
        return Page(rows, None)
    rows = rows[:limit]
    return Page(rows, encode_cursor(str(getattr(rows[-1], key.key))))


def first_of(pages: Sequence[Page[T]], key: InstrumentedAttribute[Any], limit: int) -> Page[T]:
    """The first rows of several pages in ascending order of `key`, as one page. No row may be in two of them."""
    rows = sorted((row for page in pages for row in page.rows), key=attrgetter(key.key))
    has_more = len(rows) > limit or any(page.next_cursor is not None for page in pages)
    rows = rows[:limit]
    return Page(rows, encode_cursor(str(getattr(rows[-1], key.key))) if has_more else None)


def _indexed_filters(key: InstrumentedAttribute[Any], values: ColumnValues) -> list[InstrumentedAttribute[Any]]:
    """The columns before `key` in the index that covers most of the filters."""
    by_name = {column.key: column for column in values}
    prefixes = []
    for index in key.class_.__table__.indexes:
        *prefix, last = (column.name for column in index.columns)
        if last == key.key and by_name.keys() >= set(prefix):
            prefixes.append(prefix)
    return [by_name[name] for name in max(sorted(prefixes), key=len, default=[])]


def _range(
    equal: ColumnValues, key: InstrumentedAttribute[Any], last: object | None, newest_first: bool
) -> list[ColumnElement[bool]]:
    """Bounds of the rows that have the values of `equal` and follow the key `last`."""
    bounds: list[ColumnElement[bool]] = []
    if last is not None:
        position = tuple_(*equal, key)
        last_position = tuple_(*equal.values(), last)
        bounds.append(position < last_position if newest_first else position > last_position)

    if equal:
        columns = tuple_(*equal)
        values = tuple_(*equal.values())
        if last is None or newest_first:
            bounds.append(columns >= values)
        if last is None or not newest_first:
            bounds.append(columns <= values)
    return bounds


def _last(key: InstrumentedAttribute[Any], cursor: str) -> Any:
    """The last key of the previous page."""
    return number_after(cursor) if key.type.python_type is int else id_after(cursor)


def id_after(cursor: str) -> str:
    """The id in a cursor. Raises InvalidRequestError."""
    try:
        return decode_cursor(cursor)
    except (ValueError, binascii.Error) as error:
        raise _invalid_cursor() from error


def number_after(cursor: str) -> int:
    """The number in a cursor. Raises InvalidRequestError."""
    try:
        number = int(decode_cursor(cursor))
    except (ValueError, binascii.Error) as error:
        raise _invalid_cursor() from error
    if abs(number) >= 1 << 62:  # so that the end of a page is a 64-bit number, too
        raise _invalid_cursor()
    return number


def _invalid_cursor() -> InvalidRequestError:
    message = "expected next_cursor of an earlier page, got another value"
    return InvalidRequestError.at("/cursor", message, "invalid_cursor")


def encode_cursor(last: str) -> str:
    """The cursor of the page after the key `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """The key that `encode_cursor` encoded. Raises ValueError for an invalid cursor."""
    decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    if not decoded.isprintable() or len(decoded) > 100:
        raise ValueError("invalid cursor")
    return decoded
