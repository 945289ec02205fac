"""The unit of work: opens transactions and is the only one to commit them.

SQLite: write-ahead log, a full sync at each commit, foreign keys on; a writing transaction begins IMMEDIATE, so that
it waits for its turn at the start and never fails in the middle.

PostgreSQL: writing is READ COMMITTED (each statement sees what was committed before it; rows are locked where that
matters: a job before its stages), reading is REPEATABLE READ, one view. Nothing waits without an end: connecting,
statements, locks and idle transactions have time limits.

A transaction that the database gave up on, or whose connection was lost before COMMIT was sent, is in no part in the
database and may run again (`UnitOfWork.run`). Where the reply to COMMIT was lost, nobody knows: `run` waits until the
database no longer has that transaction in progress, and then asks the caller's `committed`, which looks for what only
that transaction can have written (a new id, a lease's epoch).
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from service.errors import OutcomeUnknownError
from service.queue import Hint, Queue, SilentQueue

T = TypeVar("T")

PATIENCE_SECONDS = 5.0
"""How long a client's request waits for a database that is away."""

_BUSY_MILLISECONDS = 30_000
_CONNECT_SECONDS = 5
_STATEMENT_MILLISECONDS = 60_000
_LOCK_MILLISECONDS = 10_000
_IDLE_IN_TRANSACTION_MILLISECONDS = 60_000
_SILENT_CONNECTION_MILLISECONDS = 30_000
_RECYCLE_SECONDS = 1800
_KEPT_CONNECTIONS = 10
_FURTHER_CONNECTIONS = 30
"""With those kept, one for each of the 40 threads that the API's requests run on."""
_POOL_SECONDS = 10

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_ROLLED_BACK = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, a lock not had in time."""
_AWAY = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03", "53300"})
"""The server stops, has crashed, starts, has closed an idle connection or transaction, has too many."""

_HINTS = "hints"


def make_engine(url: str) -> Engine:
    """The engine of the database at `url`; `postgresql://` means psycopg."""
    if url.startswith("sqlite"):
        engine = create_engine(url)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    limits = {
        "statement_timeout": _STATEMENT_MILLISECONDS,
        "lock_timeout": _LOCK_MILLISECONDS,
        "idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION_MILLISECONDS,
    }

    arguments = {
        "application_name": "dfusion",
        "connect_timeout": _CONNECT_SECONDS,
        "tcp_user_timeout": _SILENT_CONNECTION_MILLISECONDS,
        "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
    }
    return create_engine(
        parsed,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_recycle=_RECYCLE_SECONDS,
        pool_size=_KEPT_CONNECTIONS,
        max_overflow=_FURTHER_CONNECTIONS,
        pool_timeout=_POOL_SECONDS,
        connect_args={name: value for name, value in arguments.items() if name not in parsed.query},
    )


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


def is_transient(error: BaseException) -> bool:
    """Whether the same may work later: the database is away, or gave up on this transaction for another's sake."""
    if isinstance(error, (PoolTimeoutError, OutcomeUnknownError)):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        primary = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        return primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    state = _sqlstate(error)
    if state is None:  # the driver's own: it cannot connect, or has lost the connection
        return isinstance(error, (OperationalError, InterfaceError))
    return state in _ROLLED_BACK or state in _AWAY or state.startswith("08")


def _sqlstate(error: DBAPIError) -> str | None:
    state = getattr(error.orig, "sqlstate", None)
    return state if isinstance(state, str) else None


def repeatable(_session: Session, _result: object) -> bool:
    """`committed` of a transaction that may as well run twice."""
    return False


class _Patience:
    """Pauses between attempts, longer and longer, until the time is over."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE_SECONDS

    def wait(self, error: Exception) -> None:
        """Wait a little; raises `error` where there is no time left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise error
        time.sleep(min(left, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)


def hint_after_commit(session: Session, hints: Iterable[Hint]) -> None:
    """Send these hints once the session's transaction is committed; if it never is, they are forgotten."""
    session.info.setdefault(_HINTS, []).extend(hints)


class UnitOfWork:
    """Transactions on one database, and the hints that follow from them."""

    def __init__(self, engine: Engine, queue: Queue | None = None) -> None:
        self.engine = engine
        self.queue: Queue = SilentQueue() if queue is None else queue
        self._reader = engine.execution_options(reads_only=True)
        if engine.dialect.name == "postgresql":
            self._reader = self._reader.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

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
            self._send_hints(session)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view of the database; what is changed in it is not kept."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def run(
        self,
        function: Callable[[Session], T],
        committed: Callable[[Session, T], bool] | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> T:
        """The result of `function` in a transaction that is committed; tried again for so long while `is_transient`.

        `function` may be called several times; only one call's changes are kept. `committed(session, result)` says
        from the database whether the transaction that gave `result` is in it. Raises OutcomeUnknownError where the
        reply to COMMIT was lost and there is no `committed`, or the database stays away; else what `function` and
        the database raise.
        """
        patience = _Patience(patience_seconds)
        while True:
            sent: list[tuple[T, str | None]] = []
            try:
                with Session(self.engine, expire_on_commit=False) as session:
                    with session.begin():
                        result = function(session)
                        session.flush()
                        sent.append((result, _transaction_id(session)))
                    self._send_hints(session)
                return result
            except (DBAPIError, PoolTimeoutError) as error:
                if not is_transient(error):
                    raise
                if sent and _is_outcome_unknown(error):
                    result, transaction = sent[0]
                    if self._is_committed(result, transaction, committed, patience):
                        return result
                patience.wait(error)

    def _send_hints(self, session: Session) -> None:
        """After a commit; hints of one whose reply was lost are left to the sweeper."""
        hints = session.info.pop(_HINTS, [])
        if hints:
            self.queue.hint(hints)

    def _is_committed(
        self,
        result: T,
        transaction: str | None,
        committed: Callable[[Session, T], bool] | None,
        patience: _Patience,
    ) -> bool:
        unknown = OutcomeUnknownError("the database went away at a commit; whether it took place is not known")
        if committed is None:
            raise unknown
        while True:
            try:
                with self.reading() as session:
                    going_on = transaction is not None and _is_in_progress(session, transaction)
                if not going_on:
                    with self.reading() as session:  # a view from after the end, whatever that was
                        return committed(session, result)
            except (DBAPIError, PoolTimeoutError) as error:
                if not is_transient(error):
                    raise
            patience.wait(unknown)

    def close(self) -> None:
        """Give all connections back."""
        self.queue.close()
        self.engine.dispose()


def _is_outcome_unknown(error: DBAPIError | PoolTimeoutError) -> bool:
    """Whether an error in answer to COMMIT leaves open what became of it."""
    if not isinstance(error, DBAPIError) or isinstance(error.orig, sqlite3.Error):
        return False
    return _sqlstate(error) not in _ROLLED_BACK


def _transaction_id(session: Session) -> str | None:
    """The number by which PostgreSQL knows the transaction; None where it has written nothing."""
    if session.get_bind().dialect.name != "postgresql":
        return None
    found: str | None = session.scalar(text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)"))
    return found


def _is_in_progress(session: Session, transaction: str) -> bool:
    """Whether that transaction still goes on: until its end it holds a lock on its own number."""
    query = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted "
        "AND transactionid = xid(CAST(:transaction AS xid8))"
    )
    return bool(session.scalar(query, {"transaction": transaction}))
