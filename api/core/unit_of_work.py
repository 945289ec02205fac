"""The unit of work: opens transactions and is the only one to commit them.

SQLite: write-ahead log, a full sync at each commit, foreign keys on; a writing transaction begins IMMEDIATE, so that
it waits for its turn at the start and never fails in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session

from api.core.queue import Hint, Queue, SilentQueue

_BUSY_MILLISECONDS = 30_000
_HINTS = "hints"


def make_engine(url: str) -> Engine:
    """The engine of the database at `url`."""
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, pool_recycle=1800)
    engine = create_engine(url)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # BEGIN comes from _begin_sqlite, not from the driver
    for pragma in (
        f"busy_timeout={_BUSY_MILLISECONDS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


def hint_after_commit(session: Session, hints: Iterable[Hint]) -> None:
    """Send these hints once the session's transaction is committed; if it never is, they are forgotten."""
    session.info.setdefault(_HINTS, []).extend(hints)


class UnitOfWork:
    """Transactions on one database, and the hints that follow from them."""

    def __init__(self, engine: Engine, queue: Queue | None = None) -> None:
        self.engine = engine
        self.queue: Queue = SilentQueue() if queue is None else queue
        self._reader = engine.execution_options(reads_only=True)

    @classmethod
    def connect(cls, url: str, queue: Queue | None = None) -> UnitOfWork:
        """A unit of work on the database at `url`; without a queue its hints go nowhere."""
        return cls(make_engine(url), queue)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction: committed when the block ends, rolled back when it raises. Its hints follow the commit."""
        with Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            hints = session.info.pop(_HINTS, [])
        if hints:
            self.queue.hint(hints)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view of the database; what is changed in it is not kept."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        """Give all connections back."""
        self.queue.close()
        self.engine.dispose()
