"""Advisory locks of the database."""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy import text
from sqlalchemy.orm import Session


class AdvisoryLock(IntEnum):
    """The advisory locks by their keys in PostgreSQL: the letters "df", then a number."""

    MIGRATION = 0x6466_0001
    CATALOGUE = 0x6466_0002
    SWEEP = 0x6466_0003
    COLLECTION = 0x6466_0004
    WEBHOOKS = 0x6466_0008


def hold(session: Session, lock: AdvisoryLock) -> None:
    """Hold a lock until the transaction ends. SQLite needs none, since it has only one writer."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock.value})
