"""The database's own locks."""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy import text
from sqlalchemy.orm import Session


class AdvisoryLock(IntEnum):
    """What PostgreSQL's advisory locks are for, by their numbers (the letters "df", then a running number)."""

    MIGRATION = 0x6466_0001
    CATALOGUE = 0x6466_0002


def hold(session: Session, lock: AdvisoryLock) -> None:
    """Hold the database's lock until the transaction ends; SQLite has only one writer anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock.value})
