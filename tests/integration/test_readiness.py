"""GET /readyz when a server is unavailable, hangs or is misconfigured."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from minio import Minio
from sqlalchemy import text

from api import readiness
from api.main import create_app
from api.readiness import _FRESH_SECONDS, Readiness
from api.wire.health import CheckOut
from service.db.unit_of_work import make_engine
from tests.deployment import until
from tests.servers import PostgresServer, S3Server, free_port, postgres_server, redis_server, s3_server
from tests.service import migrated_template, service_of, settings_for

SOON_SECONDS = 4.0
"""Two seconds for the checks, and two for a busy machine."""


@contextmanager
def opened(folder: Path, **changes: Any) -> Iterator[TestClient]:
    app = create_app(settings_for(folder / "data", folder / "tiny", **changes))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def look_again(client: TestClient) -> tuple[int, str, dict[str, str]]:
    """Look after the results of an earlier request have expired."""
    time.sleep(_FRESH_SECONDS)
    return look(client)


def look(client: TestClient) -> tuple[int, str, dict[str, str]]:
    """Return the HTTP status, the overall state and the checks of GET /readyz. Fails if the response is slow."""
    begun = time.monotonic()
    response = client.get("/readyz")
    assert time.monotonic() - begun < SOON_SECONDS
    body = response.json()
    return response.status_code, body["status"], {check["name"]: check["state"] for check in body["checks"]}


@contextmanager
def silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def processes(server: PostgresServer) -> list[psutil.Process]:
    assert server._process is not None
    process = psutil.Process(server._process.pid)
    return [process, *process.children(recursive=True)]


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def test_shutdown_waits_briefly_for_a_running_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def slow(*_: object) -> CheckOut | None:
        time.sleep(0.5)
        ended.set()
        return None

    monkeypatch.setattr(readiness, "CHECKS", {"disk": slow})
    with opened(tmp_path) as client:
        checks = Readiness(service_of(client), None, timeout_seconds=0.01)
        checks.run_checks()
        checks.close()
        assert not ended.is_set()  # not longer than its timeout
        checks._timeout_seconds = 30
        checks.close()
        assert ended.is_set()


def test_results_are_returned_again_for_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*_: object) -> CheckOut:
        calls.append(1)
        return CheckOut(name="disk", state="ok", detail="")

    monkeypatch.setattr(readiness, "CHECKS", {"disk": counted})
    with opened(tmp_path) as client:
        for _ in range(5):
            assert look(client)[2] == {"disk": "ok"}
        assert len(calls) == 1
        look_again(client)
        assert len(calls) == 2


def test_all_checks_pass(tmp_path: Path, postgres_url: str, s3: S3Server) -> None:
    with (
        redis_server(tmp_path) as redis,
        opened(tmp_path, database_url=postgres_url, broker_url=redis.url, **s3.settings("well")) as client,
    ):
        status, overall, states = look(client)
    assert (status, overall) == (200, "ok")
    assert states == dict.fromkeys(("database", "migrations", "broker", "storage", "disk"), "ok") | {
        "worker": "warning"
    }


def test_an_unavailable_broker_is_reported_as_degraded(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis, opened(tmp_path, broker_url=redis.url) as client:
        redis.kill()
        status, overall, states = look(client)
        assert (status, overall, states["broker"], states["database"]) == (200, "degraded", "failed", "ok")
        redis.start()
        assert look_again(client)[:2] == (200, "ok")


def test_a_hanging_broker_is_reported_as_degraded(tmp_path: Path) -> None:
    with silent_server() as port, opened(tmp_path, broker_url=f"redis://:swordfish@127.0.0.1:{port}/0") as client:
        status, overall, states = look(client)
        assert (status, overall, states["broker"]) == (200, "degraded", "failed")
        assert "swordfish" not in client.get("/readyz").text


def test_unavailable_storage_is_reported_as_degraded(tmp_path: Path) -> None:
    folder, port = tmp_path / "s3", free_port()
    folder.mkdir()
    with s3_server(folder, port) as server, opened(tmp_path, **server.settings("away")) as client:
        assert look(client)[1] == "ok"
        server.stop()
        status, overall, states = look_again(client)
        assert (status, overall, states["storage"]) == (200, "degraded", "failed")
        server.start()
        assert look_again(client)[1] == "ok"


def test_hanging_storage_is_reported_as_degraded(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    folder.mkdir()
    with s3_server(folder) as server, opened(tmp_path, **server.settings("hangs")) as client:
        server.stop()
        with socket.create_server(("127.0.0.1", server.port)):
            status, overall, states = look(client)
    assert (status, overall, states["storage"]) == (200, "degraded", "failed")


def test_a_missing_bucket_is_reported(tmp_path: Path, s3: S3Server) -> None:
    with opened(tmp_path, **s3.settings("gone")) as client:
        own = Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False)
        for stored in own.list_objects("gone", recursive=True):
            own.remove_object("gone", stored.object_name)
        own.remove_bucket("gone")
        until(lambda: look(client)[2]["storage"] == "failed")


def test_a_read_only_folder_is_reported_as_degraded(tmp_path: Path) -> None:
    with opened(tmp_path) as client:
        shutil.rmtree(tmp_path / "data" / "artifacts")
        (tmp_path / "data" / "artifacts").write_bytes(b"in the way")
        status, overall, states = look(client)
    assert (status, overall, states["storage"]) == (200, "degraded", "failed")


def test_little_disk_space_is_reported_as_degraded(tmp_path: Path) -> None:
    with opened(tmp_path, min_free_disk_mb=10**9) as client:
        status, overall, states = look(client)
    assert (status, overall, states["disk"]) == (200, "degraded", "failed")


def test_a_schema_of_another_version_is_not_ready(tmp_path: Path, postgres_url: str) -> None:
    with opened(tmp_path, database_url=postgres_url) as client:
        engine = make_engine(postgres_url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        engine.dispose()
        status, overall, states = look(client)
        assert (status, overall, states["migrations"], states["database"]) == (503, "unavailable", "failed", "ok")
        assert "9999" in client.get("/readyz").text


def test_an_unavailable_database_is_not_ready(tmp_path: Path, own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database(migrated_template(own_postgres))
    with opened(tmp_path, database_url=url) as client:
        assert look(client)[0] == 200
        own_postgres.stop()
        status, overall, states = look_again(client)
        assert (status, overall, states["database"], states["storage"]) == (503, "unavailable", "failed", "ok")
        own_postgres.start()
        assert look_again(client)[0] == 200


DATABASE_CHECKS = {"check-database", "check-migrations", "check-worker"}
"""The threads that hang: at most one per check, even after repeated requests."""


def test_a_hanging_database_is_not_ready_and_blocks_one_thread_per_check(
    tmp_path: Path, own_postgres: PostgresServer
) -> None:
    url = own_postgres.create_database(migrated_template(own_postgres))
    with opened(tmp_path, database_url=url) as client:
        assert look(client)[0] == 200
        suspended = processes(own_postgres)
        for process in suspended:
            process.suspend()
        most = 0
        try:
            for _ in range(3):
                status, overall, states = look_again(client)
                assert (status, overall, states["database"], states["storage"]) == (503, "unavailable", "failed", "ok")
                hanging = [thread.name for thread in threading.enumerate() if thread.name in DATABASE_CHECKS]
                most = max(most, len(hanging))
                assert len(hanging) == len(set(hanging))  # a thread that had to reconnect times out after 5 s
            assert most == len(DATABASE_CHECKS)
        finally:
            for process in suspended:
                process.resume()
        until(lambda: look(client)[0] == 200)
