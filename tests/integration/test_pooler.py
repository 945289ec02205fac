"""Connections to PostgreSQL: their number, and PgBouncer in transaction mode, which shares sessions."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, text

from api.main import create_app
from service.db.locks import AdvisoryLock, try_hold
from service.db.migrate import migrate
from service.db.unit_of_work import API_POOL, SWEEPER_POOL, WORKER_POOL, UnitOfWork, make_engine
from service.jobs.kinds import RoundSpec
from service.maintenance import sweep_once
from service.service import Service, create_job
from tests.servers import PgBouncer, PostgresServer
from tests.service import PROMPTS, round_body, service_of, settings_for, work_until_idle
from tests.statements import statements
from worker.presence import Presence

MAX_CONNECTIONS = 200
RESERVED = 3
"""Connections that PostgreSQL keeps for superusers."""


def test_a_hundred_workers_fit_the_connections_of_postgres(postgres_url: str) -> None:
    for pool in (API_POOL, WORKER_POOL, SWEEPER_POOL):
        sizes = make_engine(postgres_url, pool).pool
        assert (sizes.size(), sizes.size() + sizes._max_overflow) == (pool.kept, pool.most)  # type: ignore[attr-defined]
    # docs/operations.md: one connection for each worker, a second one for 49 of them in the same moment
    assert 100 * WORKER_POOL.kept + 49 + API_POOL.most + SWEEPER_POOL.most + RESERVED == MAX_CONNECTIONS
    assert WORKER_POOL.most <= 2


@pytest.mark.parametrize(("processes", "kept", "most"), [(1, 10, 40), (2, 5, 20), (3, 3, 13), (10, 1, 4)])
def test_the_processes_of_the_api_share_its_connections(
    tmp_path: Path, postgres_url: str, processes: int, kept: int, most: int
) -> None:
    settings = settings_for(tmp_path, tmp_path / "tiny", database_url=postgres_url, api_processes=processes)
    with TestClient(create_app(settings)) as client:
        pool = service_of(client).uow.engine.pool
        assert (pool.size(), pool.size() + pool._max_overflow) == (kept, most)  # type: ignore[attr-defined]
    assert processes * most <= API_POOL.most


def test_a_worker_holds_one_connection_and_two_at_most(tmp_path: Path, pipeline: Path, postgres_url: str) -> None:
    """Counted by the client: the server shows a connection for a moment after it was closed."""
    settings = settings_for(
        tmp_path, pipeline, database_url=postgres_url, presence_seconds=0.01, stop_check_seconds=0.01
    )
    service = Service.open(settings, pool=WORKER_POOL)
    create_job(service, RoundSpec.model_validate(round_body(prompts=PROMPTS[:1], evaluation=None)))
    presence = Presence(settings, "w", ("gpu",), lambda: service.uow, lambda: ("cpu", None, None))
    counts = [1]  # opening the service has left one
    event.listen(service.uow.engine, "connect", lambda *_: counts.append(counts[-1] + 1))
    event.listen(service.uow.engine, "close", lambda *_: counts.append(counts[-1] - 1))

    presence.start()
    work_until_idle(service)
    presence.stop()
    assert max(counts) <= 2
    assert service.uow.engine.pool.checkedin() == counts[-1] == 1  # type: ignore[attr-defined]
    service.close()


@pytest.fixture
def pgbouncer(postgres: PostgresServer, tmp_path: Path) -> Iterator[PgBouncer]:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    folder = tmp_path / "pgbouncer"
    folder.mkdir()
    server = PgBouncer(folder, postgres)
    server.start()
    yield server
    server.stop()


def test_a_job_runs_through_pgbouncer(
    tmp_path: Path, pipeline: Path, postgres: PostgresServer, pgbouncer: PgBouncer
) -> None:
    """From the migrations to the last stage. Every transaction may have another session."""
    url = pgbouncer.url(postgres.create_database())
    service = Service.open(settings_for(tmp_path, pipeline, database_url=url), pool=WORKER_POOL)
    create_job(service, RoundSpec.model_validate(round_body(prompts=PROMPTS[:1], evaluation=None)))
    work_until_idle(service)
    assert sweep_once(service)
    with service.uow.reading() as session:
        assert session.scalars(text("SELECT DISTINCT state FROM stages")).all() == ["succeeded"]
        assert session.scalar(text("SHOW statement_timeout")) == "1min"
    service.close()


def test_nothing_is_kept_in_a_session(tmp_path: Path, postgres: PostgresServer) -> None:
    uow = UnitOfWork.connect(postgres.create_database())
    with statements(uow.engine) as sent:
        migrate(uow.engine, tmp_path / "lock")
        with uow.writing() as session:
            session.execute(text("SELECT 1"))
    of_session = [
        statement
        for statement, _ in sent
        if (statement.startswith("SET ") and not statement.startswith("SET LOCAL"))
        or ("advisory" in statement and "xact" not in statement)
        or statement.startswith(("PREPARE", "LISTEN", "DECLARE"))
    ]
    assert sent and of_session == []
    with uow.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None and driver.prepare_threshold is None
        assert "options" not in driver.info.get_parameters()
    uow.close()


def test_a_lock_is_held_by_one_process_and_freed_at_the_end(postgres_url: str) -> None:
    first, second = (make_engine(postgres_url) for _ in range(2))
    with try_hold(first, AdvisoryLock.SWEEP) as is_held:
        assert is_held
        with try_hold(second, AdvisoryLock.SWEEP) as is_held_too:
            assert not is_held_too
    with try_hold(second, AdvisoryLock.SWEEP) as is_held_now:
        assert is_held_now
    first.dispose()
    second.dispose()
