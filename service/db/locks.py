"""Advisory locks of the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from service.db.unit_of_work import WITHOUT_LIMITS


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


@contextmanager
def try_hold(engine: Engine, lock: AdvisoryLock) -> Iterator[bool]:
    """Try to hold a lock of PostgreSQL during the block. It is freed if this process dies.

    A transaction without time limits holds it, since PgBouncer may share the sessions themselves.

    Yields:
        Whether this process has the lock.
    """
    with engine.connect() as connection, connection.execution_options(**{WITHOUT_LIMITS: True}).begin():
        yield bool(connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": lock.value}))
