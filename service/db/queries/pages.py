"""Keyset pagination: the cursor is the last key of the previous page."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import InvalidRequestError
from service.ids import kind_of

T = TypeVar("T")
ColumnValues = Mapping[InstrumentedAttribute[Any], Any]

MAX_READ = 10_000
"""The most rows that a page reads to find those that a filter without an index selects."""
_SELECTIVE = ("job_id", "prompt")
"""Columns of filters that select few rows, the best first."""


@dataclass(frozen=True)
class Page(Generic[T]):
    """The rows of a page, and the cursor of the next page; None on the last page."""

    rows: list[T]
    next_cursor: str | None


@dataclass(frozen=True)
class Period:
    """The times from `start`, inclusive, to `stop`, exclusive, in seconds since 1970. None is no bound."""

    start: float | None = None
    stop: float | None = None


ALWAYS = Period()


@dataclass(frozen=True)
class Span:
    """The rows with a time in a period. There is an index of the column and the key."""

    column: InstrumentedAttribute[float]
    period: Period


def fetch_page(
    session: Session,
    query: Select[T],
    key: InstrumentedAttribute[Any],
    limit: int,
    cursor: str | None,
    newest_first: bool = False,
    equal: ColumnValues | None = None,
    span: Span | None = None,
    where: Sequence[ColumnElement[bool]] = (),
    max_read: int = MAX_READ,
) -> Page[T]:
    """Fetch the page after `cursor`, in order of `key`, or in order of time if `span` has the best index.

    A page is a range of one index. Filters that this index does not cover are applied to the next `max_read` rows of
    the range. If these contain fewer than `limit` rows, the page is shorter, and its cursor continues after them.

    Filters by columns of the index become bounds of the range in the order of the index. As equalities they mean the
    same, but PostgreSQL may then scan all rows in the order of `key`.

    Args:
        session: A view of the database.
        query: Selects the rows. Its own conditions are those of an index.
        key: A unique column: an id, which sorts by age, or the number of an event.
        limit: The maximum number of rows.
        cursor: The cursor of the previous page; None for the first page.
        newest_first: Descending order.
        equal: Filters, as columns and their values. A list matches any of its values; None and [] match all.
        span: A filter by time.
        where: Other filters.
        max_read: The maximum number of rows that are read if not all filters are covered by the index.

    Raises:
        InvalidRequestError: The cursor is invalid.
    """
    # 1. the index and the filters that it does not cover, and the rows after the cursor
    plan = _plan(key, equal or {}, span, where)
    after = None if cursor is None else _position(plan.order, cursor)
    start, stop = _ends(plan, span, after, newest_first)
    columns = (*plan.prefix, *plan.order)
    bounds = _bounds(columns, start, stop, newest_first)
    by_position = [column.desc() if newest_first else column for column in columns]

    # 2. where the search ends if it does not find enough rows
    last_read = None
    if plan.filters:
        positions = select(*columns).where(*([] if query.whereclause is None else [query.whereclause]), *bounds)
        row = session.execute(positions.order_by(*by_position).offset(max_read - 1).limit(1)).one_or_none()
        if row is not None:
            last_read = tuple(row)
            bounds = _bounds(columns, start, _End(last_read, inclusive=True), newest_first)

    # 3. one row more than the page, which shows whether there is a next page
    rows = list(session.scalars(query.where(*bounds, *plan.filters).order_by(*by_position).limit(limit + 1)))
    if len(rows) > limit:
        rows = rows[:limit]
        return Page(rows, _cursor(tuple(getattr(rows[-1], column.key) for column in plan.order)))
    return Page(rows, None if last_read is None else _cursor(last_read[len(plan.prefix) :]))


def span_of(column: InstrumentedAttribute[float], period: Period) -> Span | None:
    """The filter of the rows with a time in the period; None if all have one."""
    return None if period == ALWAYS else Span(column, period)


def first_of(pages: Sequence[Page[T]], key: InstrumentedAttribute[Any], limit: int) -> Page[T]:
    """The first rows of several pages in ascending order of `key`, as one page. No row may be in two of them."""
    ends = [_position((key,), page.next_cursor)[0] for page in pages if page.next_cursor is not None]
    rows = sorted((row for page in pages for row in page.rows), key=attrgetter(key.key))
    rows = [row for row in rows if not ends or getattr(row, key.key) <= min(ends)]
    if len(rows) > limit:
        rows = rows[:limit]
        return Page(rows, _cursor((getattr(rows[-1], key.key),)))
    return Page(rows, _cursor((min(ends),)) if ends else None)


@dataclass(frozen=True)
class _Plan:
    """How a page is read: the columns of its index and the filters that the index does not cover.

    prefix   columns with one value in all rows, which are the first of the index
    values   these values
    order    the next columns of the index, in the order of the page: the key, or a time and the key
    filters  the other filters
    """

    prefix: Sequence[InstrumentedAttribute[Any]]
    values: tuple[Any, ...]
    order: Sequence[InstrumentedAttribute[Any]]
    filters: list[ColumnElement[bool]]


def _plan(
    key: InstrumentedAttribute[Any], equal: ColumnValues, span: Span | None, where: Sequence[ColumnElement[bool]]
) -> _Plan:
    values = {}
    filters = [*where]
    for column, value in equal.items():
        if isinstance(value, list) and len(value) > 1:
            filters.append(unindexed(column).in_(value))
        elif value is not None and value != []:
            values[column] = value[0] if isinstance(value, list) else value

    # an index of times is better than those of filters that select many rows
    prefix = _indexed_filters(key, values)
    order: Sequence[InstrumentedAttribute[Any]] = (key,)
    if span is not None and not any(column.key in _SELECTIVE for column in prefix):
        prefix = []
        order = (span.column, key)
    elif span is not None:
        filters += _within(span)

    filters += [unindexed(column) == value for column, value in values.items() if column not in prefix]
    return _Plan(prefix, tuple(values[column] for column in prefix), order, filters)


def _indexed_filters(key: InstrumentedAttribute[Any], values: ColumnValues) -> list[InstrumentedAttribute[Any]]:
    """The columns before `key` in the index that covers the most selective filters, then the most filters."""
    by_name = {column.key: column for column in values}
    prefixes = []
    for index in key.class_.__table__.indexes:
        *prefix, last = (column.key for column in index.columns)
        if last == key.key and by_name.keys() >= set(prefix):
            prefixes.append(prefix)
    return [by_name[name] for name in max(sorted(prefixes), key=_selectivity, default=[])]


def _selectivity(names: Sequence[str]) -> tuple[bool | int, ...]:
    return *(name in names for name in _SELECTIVE), len(names)


def unindexed(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """The column as an expression that has no index. With the column, PostgreSQL may prefer its index to the range."""
    return func.coalesce(column, column)


def _within(span: Span) -> list[ColumnElement[bool]]:
    """The filter `span` as conditions."""
    column = unindexed(span.column)
    lower = [] if span.period.start is None else [column >= span.period.start]
    upper = [] if span.period.stop is None else [column < span.period.stop]
    return lower + upper


@dataclass(frozen=True)
class _End:
    """An end of a range: values of the first columns of its index."""

    values: tuple[Any, ...]
    inclusive: bool


def _ends(
    plan: _Plan, span: Span | None, after: tuple[Any, ...] | None, newest_first: bool
) -> tuple[_End | None, _End | None]:
    """The first and the last position of a range, in the order of the page."""
    first = last = _End(plan.values, inclusive=True) if plan.values else None
    is_by_time = span is not None and len(plan.order) > 1
    if span is not None and is_by_time:
        low = None if span.period.start is None else _End((span.period.start,), inclusive=True)
        high = None if span.period.stop is None else _End((span.period.stop,), inclusive=False)
        first, last = (high, low) if newest_first else (low, high)

    # a cursor of another list can be before the period, which then starts the page
    if after is not None:
        is_before = False
        if is_by_time and first is not None:
            is_before = after[0] >= first.values[0] if newest_first else after[0] < first.values[0]
        if not is_before:
            first = _End((*plan.values, *after), inclusive=False)
    return first, last


def _bounds(
    columns: Sequence[InstrumentedAttribute[Any]], first: _End | None, last: _End | None, newest_first: bool
) -> list[ColumnElement[bool]]:
    """The rows from the position `first` to the position `last`."""
    lower, upper = (last, first) if newest_first else (first, last)
    bounds: list[ColumnElement[bool]] = []
    if lower is not None:
        position, values = _tuples(columns, lower)
        bounds.append(position >= values if lower.inclusive else position > values)
    if upper is not None:
        position, values = _tuples(columns, upper)
        bounds.append(position <= values if upper.inclusive else position < values)
    return bounds


def _tuples(columns: Sequence[InstrumentedAttribute[Any]], end: _End) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """The columns that `end` has values of, and these values."""
    return tuple_(*columns[: len(end.values)]), tuple_(*end.values)


def _cursor(position: Sequence[Any]) -> str:
    """The cursor of the page after this position: the key, or the time and the key."""
    return encode_cursor(" ".join(map(str, position)))


def _position(order: Sequence[InstrumentedAttribute[Any]], cursor: str) -> tuple[Any, ...]:
    """The position in a cursor. Raises InvalidRequestError, also for the cursor of a list in another order."""
    if order[-1].type.python_type is int:
        return (number_after(cursor),)
    *times, last_id = _decoded(cursor).split(" ")
    try:
        seconds = [float(time) for time in times]
    except ValueError as error:
        raise _invalid_cursor() from error
    if kind_of(last_id) is None or len(seconds) != len(order) - 1 or not all(map(math.isfinite, seconds)):
        raise _invalid_cursor()
    return (*seconds, last_id)


def id_after(cursor: str) -> str:
    """The id in a cursor. Raises InvalidRequestError."""
    decoded = _decoded(cursor)
    if kind_of(decoded) is None:
        raise _invalid_cursor()
    return decoded


def number_after(cursor: str) -> int:
    """The number in a cursor. Raises InvalidRequestError."""
    decoded = _decoded(cursor)
    if not decoded.isdecimal() or int(decoded) >= 1 << 62:  # so that the end of a page is a 64-bit number, too
        raise _invalid_cursor()
    return int(decoded)


def _decoded(cursor: str) -> str:
    try:
        return decode_cursor(cursor)
    except (ValueError, binascii.Error) as error:
        raise _invalid_cursor() from error


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
