"""Transactions on a real PostgreSQL: retries, no duplicate commits, and lost replies."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from dfusion.prompts import Prompt
from service.db.clock import now_seconds
from service.db.queries import prompt_sets
from service.db.tables import PromptSet
from service.db.unit_of_work import UnitOfWork, is_transient
from service.errors import OutcomeUnknownError
from tests.servers import CuttingProxy, PostgresServer, cutting_proxy, postgres_server

COMMIT = b"COMMIT\0"
PROMPTS = (Prompt(text="a cat", items=("cat",), thresholds=(0.5,)),)


@pytest.fixture
def uow(postgres_url: str) -> Iterator[UnitOfWork]:
    opened = UnitOfWork.connect(postgres_url)
    yield opened
    opened.close()


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[CuttingProxy]:
    with cutting_proxy(postgres.port) as opened:
        yield opened


@pytest.fixture
def far(postgres_url: str, proxy: CuttingProxy) -> Iterator[UnitOfWork]:
    """The database of `uow`, through the proxy."""
    opened = UnitOfWork.connect(make_url(postgres_url).set(port=proxy.port).render_as_string(hide_password=False))
    yield opened
    opened.close()


def add_set(name: str) -> Callable[[Session], str]:
    return lambda session: prompt_sets.add(session, prompt_sets.unsaved(PROMPTS, name)).id


def is_there(session: Session, set_id: str) -> bool:
    return prompt_sets.by_id(session, set_id) is not None


def names(uow: UnitOfWork) -> list[str | None]:
    with uow.reading() as session:
        return list(session.scalars(select(PromptSet.name).order_by(PromptSet.name)))


def test_connections_have_limits(uow: UnitOfWork) -> None:
    with uow.writing() as session:
        shown = {name: session.scalar(text(f"SHOW {name}")) for name in LIMITS}
    assert shown == LIMITS


LIMITS = {
    "application_name": "dfusion",
    "statement_timeout": "1min",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "1min",
    "transaction_isolation": "read committed",
    "transaction_read_only": "off",
}


def test_the_clock_advances_within_a_transaction(database_url: str, tmp_path: Path) -> None:
    uow = UnitOfWork.connect(database_url or f"sqlite:///{tmp_path / 'clock.db'}")
    with uow.writing() as session:
        first = session.scalars(select(now_seconds())).one()
        threading.Event().wait(0.05)
        second = session.scalars(select(now_seconds())).one()
    uow.close()
    assert 0.04 < second - first < 60
    assert 1_700_000_000 < first < 5_000_000_000  # seconds of this century, not milliseconds or days


def test_reading_is_one_view_and_changes_nothing(uow: UnitOfWork) -> None:
    with uow.reading() as session:
        before = prompt_sets.latest(session, "later")
        uow.run(add_set("later"))
        assert (before, prompt_sets.latest(session, "later")) == (None, None)
    with uow.reading() as session, pytest.raises(DBAPIError, match="read-only"):
        prompt_sets.add(session, prompt_sets.unsaved(PROMPTS, "never"))
    assert names(uow) == ["later"]


def test_a_deadlock_is_tried_again(uow: UnitOfWork) -> None:
    ids = [uow.run(add_set(name)) for name in ("a", "b")]
    both_hold_one = threading.Barrier(2)
    one_has_committed = threading.Event()
    tries: list[str] = []

    def change(first: str, second: str) -> Callable[[Session], None]:
        def function(session: Session) -> None:
            tries.append(first)
            if len(tries) > 2:  # otherwise it could lock its row before the other wakes up, and deadlock again
                assert one_has_committed.wait(30)
            session.get_one(PromptSet, first, with_for_update=True).version += 1
            session.flush()
            if len(tries) <= 2:
                both_hold_one.wait(30)
            session.get_one(PromptSet, second, with_for_update=True).version += 1

        return function

    def run(first: str, second: str) -> None:
        uow.run(change(first, second))
        one_has_committed.set()

    threads = [threading.Thread(target=run, args=pair) for pair in (ids, ids[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with uow.reading() as session:
        assert [session.get_one(PromptSet, set_id).version for set_id in ids] == [3, 3]
    assert len(tries) == 3  # one of the two was aborted and retried


def test_a_connection_lost_before_the_commit_is_tried_again(uow: UnitOfWork, postgres: PostgresServer) -> None:
    tries: list[str] = []

    def add(session: Session) -> str:
        set_id = prompt_sets.add(session, prompt_sets.unsaved(PROMPTS, "one")).id
        tries.append(set_id)
        if len(tries) == 1:
            pid = session.scalar(text("SELECT pg_backend_pid()"))
            postgres.execute(f"SELECT pg_terminate_backend({pid}, 10000)")
        return set_id

    assert uow.run(add) == tries[1]
    assert names(uow) == ["one"]


@pytest.mark.parametrize("delivered", [True, False])
def test_a_lost_reply_to_a_commit_doubles_and_loses_nothing(
    uow: UnitOfWork, far: UnitOfWork, proxy: CuttingProxy, delivered: bool
) -> None:
    created: list[str] = []

    def add(session: Session) -> str:
        created.append(add_set(f"set-{len(created)}")(session))
        return created[-1]

    proxy.cut_at(COMMIT, delivered)
    assert far.run(add, is_there) == created[-1]
    assert proxy.cuts == 1
    assert (len(created), names(uow)) == ((1, ["set-0"]) if delivered else (2, ["set-1"]))


def test_a_lost_reply_with_unknown_outcome_is_an_error(far: UnitOfWork, proxy: CuttingProxy) -> None:
    proxy.cut_at(COMMIT, delivered=True)
    with pytest.raises(OutcomeUnknownError):
        far.run(add_set("one"))
    assert names(far) == ["one"]


def test_a_running_commit_is_waited_for(uow: UnitOfWork, far: UnitOfWork, proxy: CuttingProxy) -> None:
    """A deferred trigger delays the COMMIT whose connection is lost."""
    with uow.writing() as session:
        for statement in SLOW_COMMIT:
            session.execute(text(statement))
    proxy.cut_at(COMMIT, delivered=True, answered=False)
    created: list[str] = []

    def add(session: Session) -> str:
        created.append(add_set("one")(session))
        return created[-1]

    assert far.run(add, is_there, retry_seconds=60) == created[0]
    assert (len(created), names(uow)) == (1, ["one"])


SLOW_COMMIT = (
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END'",
    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON prompt_sets DEFERRABLE INITIALLY DEFERRED "
    "FOR EACH ROW EXECUTE FUNCTION slow()",
)


def test_what_the_database_refuses_is_not_tried_again(uow: UnitOfWork) -> None:
    uow.run(add_set("one"))
    tries: list[None] = []

    def add(session: Session) -> str:
        tries.append(None)
        return add_set("one")(session)

    with pytest.raises(IntegrityError):
        uow.run(add)
    assert len(tries) == 1


def test_a_transaction_waits_for_an_unavailable_database() -> None:
    with postgres_server() as server:
        uow = UnitOfWork.connect(server.create_database())
        with uow.writing() as session:
            session.execute(text("CREATE TABLE numbers (number INT)"))
        server.stop()
        insert = text("INSERT INTO numbers VALUES (1)")
        with pytest.raises(DBAPIError) as failure:
            uow.run(lambda session: session.execute(insert), retry_seconds=0.1)
        assert is_transient(failure.value)
        later = threading.Timer(0.5, server.start)
        later.start()
        uow.run(lambda session: session.execute(insert), retry_seconds=60)
        later.join()
        with uow.reading() as session:
            assert session.scalars(text("SELECT number FROM numbers")).all() == [1]
        uow.close()


def test_a_busy_sqlite_database_passes_and_a_wrong_statement_does_not(tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "busy.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    engine = create_engine(f"sqlite:///{tmp_path / 'busy.db'}", connect_args={"timeout": 0})
    with engine.connect() as connection, pytest.raises(DBAPIError) as busy:
        connection.execute(text("CREATE TABLE numbers (number INT)"))
    holder.close()
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text("SELECT nothing FROM nowhere"))
    engine.dispose()
    assert (is_transient(busy.value), is_transient(caught.value)) == (True, False)
