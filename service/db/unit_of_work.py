"""The unit of work. Only this module opens and commits transactions.

SQLite: write-ahead log, a full sync at each commit, foreign keys on. A writing transaction begins IMMEDIATE, so that it
waits for the write lock at its start and never fails in the middle.

PostgreSQL: writing transactions are READ COMMITTED and lock rows where needed (a job before its stages). Reading ones
are REPEATABLE READ, with one view. Connecting, statements, locks and idle transactions have time limits. Nothing is set
for a session or kept in it: limits are set in each transaction, locks end with it, and statements are not prepared. So
PgBouncer may give each transaction another session (pool_mode = transaction).

`UnitOfWork.run` retries a transaction that the database rolled back, or whose connection was lost before COMMIT was
sent: nothing of it is in the database. If the reply to COMMIT was lost, its outcome is unknown. `run` then waits until
the transaction is no longer in progress and calls the caller's `committed`. That looks for what only this transaction
can have written, such as a new id or the epoch of a lease.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from service.errors import OutcomeUnknownError
from service.queue import Hint, Queue, SilentQueue

T = TypeVar("T")

RETRY_SECONDS = 5.0
"""How long a client's request is retried while the database is unavailable."""

_BUSY_MILLISECONDS = 30_000
_CONNECT_SECONDS = 5
_STATEMENT_MILLISECONDS = 60_000
_LOCK_MILLISECONDS = 10_000
_IDLE_IN_TRANSACTION_MILLISECONDS = 60_000
_TCP_TIMEOUT_MILLISECONDS = 30_000
_LIMITS = {
    "statement_timeout": _STATEMENT_MILLISECONDS,
    "lock_timeout": _LOCK_MILLISECONDS,
    "idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION_MILLISECONDS,
}
WITHOUT_LIMITS = "without_limits"
"""The execution option of a connection whose transactions have no time limits."""
_RECYCLE_SECONDS = 1800
_POOL_SECONDS = 10

_FIRST_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 1.0
_ROLLED_BACK = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, lock timeout."""
_UNAVAILABLE = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03", "53300"})
"""Shutdown, crash, startup, an idle connection or transaction was closed, too many connections."""

_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "password authentication failed": "it rejects the password",
        "does not exist": "the database or the role does not exist",
        "Connection refused": "connection refused",
        "timeout expired": "no response",
        "too many": "too many connections",
        "unable to open database file": "the file cannot be opened",
        "not a database": "the file is not a database",
    }
)
"""Short reasons by parts of the drivers' messages, which have no codes for failed connections."""
_HINTS = "hints"


@dataclass(frozen=True)
class Pool:
    """The connections of a process to PostgreSQL.

    Attributes:
        kept: Those that stay open.
        most: The most at the same time. A thread that needs one more waits.
    """

    kept: int
    most: int

    def divided_by(self, processes: int) -> Pool:
        """The connections of each of several processes that share these."""
        return Pool(max(1, self.kept // processes), max(1, self.most // processes))


API_POOL = Pool(10, 40)
"""One connection for each of the 40 threads that serve the API's requests. Several processes share them."""
WORKER_POOL = Pool(1, 2)
"""One for the stage, and another one while a lease is renewed or the worker is reported in the same moment."""
SWEEPER_POOL = Pool(2, 8)
"""Two each for a sweep and a collection, which hold their locks in transactions, and for webhooks."""


def make_engine(url: str, pool: Pool = API_POOL) -> Engine:
    """The engine of the database at `url`. `postgresql://` uses psycopg."""
    # 1. SQLite
    if url.startswith("sqlite"):
        engine = create_engine(url)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    # 2. PostgreSQL; options in the URL take precedence
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    arguments = {
        "application_name": "dfusion",
        "connect_timeout": _CONNECT_SECONDS,
        "tcp_user_timeout": _TCP_TIMEOUT_MILLISECONDS,
        "prepare_threshold": None,
    }
    engine = create_engine(
        parsed,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_recycle=_RECYCLE_SECONDS,
        pool_size=pool.kept,
        max_overflow=pool.most - pool.kept,
        pool_timeout=_POOL_SECONDS,
        connect_args={name: value for name, value in arguments.items() if name not in parsed.query},
    )
    options = str(parsed.query.get("options", ""))
    limits = {name: value for name, value in _LIMITS.items() if name not in options}
    event.listen(engine, "begin", partial(_limit_transaction, limits=limits))
    return engine


def _limit_transaction(connection: Connection, limits: Mapping[str, int]) -> None:
    """Set the time limits of a transaction of PostgreSQL."""
    if connection.get_execution_options().get(WITHOUT_LIMITS, False):
        limits = dict.fromkeys(_LIMITS, 0)
    if limits:
        connection.exec_driver_sql("; ".join(f"SET LOCAL {name} = {value}" for name, value in limits.items()))


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
    """Whether a retry can succeed: the database was unavailable, or rolled back because of a concurrent transaction."""
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
    if state is None:  # an error of the driver: it cannot connect, or has lost the connection
        return isinstance(error, (OperationalError, InterfaceError))
    return state in _ROLLED_BACK or state in _UNAVAILABLE or state.startswith("08")


def _sqlstate(error: DBAPIError) -> str | None:
    state = getattr(error.orig, "sqlstate", None)
    return state if isinstance(state, str) else None


def first_line(error: BaseException) -> str:
    """The first line of the driver's message. It can have the addresses of servers, but no passwords."""
    return next(iter(str(getattr(error, "orig", error)).splitlines()), type(error).__name__)


def reason_of(error: BaseException) -> str:
    """Why the database cannot be used, without addresses and names, since clients see it."""
    message = str(getattr(error, "orig", error))
    known = (reason for text, reason in _REASONS.items() if text in message)
    return next(known, type(error).__name__)


def repeatable(_session: Session, _result: object) -> bool:
    """`committed` of an idempotent transaction, which can run twice."""
    return False


class _Backoff:
    """Pauses between attempts with exponential backoff, until the deadline."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE_SECONDS

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt. Raises `error` after the deadline."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise error
        time.sleep(min(remaining, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(2 * self._pause, _MAX_PAUSE_SECONDS)


def hint_after_commit(session: Session, hints: Iterable[Hint]) -> None:
    """Send these hints after the session's transaction is committed. If it is rolled back, they are dropped."""
    session.info.setdefault(_HINTS, []).extend(hints)


class UnitOfWork:
    """Transactions on one database, and the hints that they send after their commit."""

    def __init__(self, engine: Engine, queue: Queue | None = None) -> None:
        self.engine = engine
        self.queue: Queue = SilentQueue() if queue is None else queue
        self._reader = engine.execution_options(reads_only=True)
        if engine.dialect.name == "postgresql":
            self._reader = self._reader.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @classmethod
    def connect(cls, url: str, queue: Queue | None = None, pool: Pool = API_POOL) -> UnitOfWork:
        """A unit of work on the database at `url`. Without a queue its hints are dropped."""
        return cls(make_engine(url, pool), queue)

    @property
    def has_one_writer(self) -> bool:
        """Whether a writing transaction blocks all others, even before it writes."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction. It is committed when the block ends and rolled back when it raises; then hints are sent."""
        with Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            self._send_hints(session)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A consistent view of the database. Changes are rolled back."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def run(
        self,
        function: Callable[[Session], T],
        committed: Callable[[Session, T], bool] | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> T:
        """Run a function in a transaction and commit it. Transient errors are retried.

        Args:
            function: Called with the session. It can be called several times; only one call's changes are committed.
            committed: Called as `committed(session, result)` in a new view after the reply to COMMIT was lost.
                Returns whether the transaction that returned `result` is in the database.
            retry_seconds: How long to retry.

        Returns:
            The result of `function`.

        Raises:
            OutcomeUnknownError: The reply to COMMIT was lost, and `committed` is None or the database is unavailable.
            DBAPIError: The database failed permanently, or for longer than `retry_seconds`.
        """
        backoff = _Backoff(retry_seconds)
        while True:
            sent: list[tuple[T, str | None]] = []  # the result and transaction id, once COMMIT is about to be sent
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
                    result, transaction_id = sent[0]
                    if self._is_committed(result, transaction_id, committed, backoff):
                        return result
                backoff.wait(error)

    def _send_hints(self, session: Session) -> None:
        """Send the hints of a committed transaction. If the reply to COMMIT was lost, the sweeper sends them."""
        hints = session.info.pop(_HINTS, [])
        if hints:
            self.queue.hint(hints)

    def _is_committed(
        self,
        result: T,
        transaction_id: str | None,
        committed: Callable[[Session, T], bool] | None,
        backoff: _Backoff,
    ) -> bool:
        """Whether a transaction whose reply to COMMIT was lost is in the database."""
        unknown = OutcomeUnknownError("the connection was lost during a commit; its outcome is unknown")
        if committed is None:
            raise unknown

        while True:
            try:
                with self.reading() as session:
                    in_progress = transaction_id is not None and _is_in_progress(session, transaction_id)
                if not in_progress:
                    with self.reading() as session:  # a new view, after the end of the transaction
                        return committed(session, result)
            except (DBAPIError, PoolTimeoutError) as error:
                if not is_transient(error):
                    raise
            backoff.wait(unknown)

    def close(self) -> None:
        """Close all connections."""
        self.queue.close()
        self.engine.dispose()


def _is_outcome_unknown(error: DBAPIError | PoolTimeoutError) -> bool:
    """Whether this error in reply to COMMIT leaves its outcome unknown."""
    if not isinstance(error, DBAPIError) or isinstance(error.orig, sqlite3.Error):
        return False
    return _sqlstate(error) not in _ROLLED_BACK


def _transaction_id(session: Session) -> str | None:
    """The id of the transaction in PostgreSQL; None if it has written nothing, and in SQLite."""
    if session.get_bind().dialect.name != "postgresql":
        return None
    transaction_id: str | None = session.scalar(text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)"))
    return transaction_id


def _is_in_progress(session: Session, transaction_id: str) -> bool:
    """Whether the transaction is in progress. It holds a lock on its own id until it ends."""
    query = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted "
        "AND transactionid = xid(CAST(:transaction_id AS xid8))"
    )
    return bool(session.scalar(query, {"transaction_id": transaction_id}))
