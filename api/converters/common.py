"""Conversion of times, paths and pages."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from api.wire.common import ListOut
from service.db.queries.pages import Page

T = TypeVar("T")
Row = TypeVar("Row")


def utc(seconds: float) -> datetime:
    """Convert a stored time, in seconds since the epoch, to UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def maybe_utc(seconds: float | None) -> datetime | None:
    """Convert a stored time that may be None."""
    return None if seconds is None else utc(seconds)


def artifact_path(artifact_id: str | None) -> str | None:
    """The path of an artifact; None without an artifact."""
    return None if artifact_id is None else f"/artifacts/{artifact_id}"


def convert_page(kind: type[ListOut[T]], page: Page[Row], convert: Callable[[Row], T]) -> ListOut[T]:
    """Convert a page of rows to the response model `kind`, with `convert` for each row."""
    data = [convert(row) for row in page.rows]
    return kind(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)
