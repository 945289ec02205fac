"""Times, paths and pages."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from api.wire.common import ListOut
from service.db.queries.pages import Page

T = TypeVar("T")
Row = TypeVar("Row")


def moment(seconds: float) -> datetime:
    """A stored time, in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def maybe_moment(seconds: float | None) -> datetime | None:
    """A stored time, if there is one."""
    return None if seconds is None else moment(seconds)


def artifact_path(artifact_id: str | None) -> str | None:
    """Where an artifact is, if there is one."""
    return None if artifact_id is None else f"/artifacts/{artifact_id}"


def list_of(kind: type[ListOut[T]], page: Page[Row], convert: Callable[[Row], T]) -> ListOut[T]:
    """A page of rows as a page of a list."""
    data = [convert(row) for row in page.rows]
    return kind(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)
