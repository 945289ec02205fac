"""Pages of a list, by keyset: the cursor is the last id of the page before."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from api.core.errors import InvalidRequestError

T = TypeVar("T")


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
) -> Page[T]:
    """The page after `cursor`, in order of `key` (unique; ids, which sort by age, or an event's number)."""
    if cursor is not None:
        query = query.where(_beyond(key, cursor, newest_first))
    rows = list(session.scalars(query.order_by(key.desc() if newest_first else key).limit(limit + 1)))
    more = len(rows) > limit
    rows = rows[:limit]
    return Page(rows, encode_cursor(str(getattr(rows[-1], key.key))) if more else None)


def _beyond(key: InstrumentedAttribute[Any], cursor: str, newest_first: bool) -> ColumnElement[bool]:
    convert: Callable[[str], Any] = key.type.python_type
    try:
        last = convert(decode_cursor(cursor))
        if isinstance(last, int) and abs(last) >= 1 << 63:
            raise ValueError("not a row's number")
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError.at("/cursor", "expected next_cursor of an earlier page", "invalid_cursor") from error
    beyond: ColumnElement[bool] = key < last if newest_first else key > last
    return beyond


def encode_cursor(last: str) -> str:
    """The cursor of what follows `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """What `encode_cursor` was given. Raises ValueError for anything else."""
    decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    if not decoded.isprintable() or len(decoded) > 100:
        raise ValueError("not a cursor")
    return decoded
