"""What cannot start says why in one line that names the setting."""

import ast
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import api.server
import api.stack.__main__
import service.db.migrate
import service.transfer.__main__
import worker.local
import worker.sweeper
from api import local_service
from api.processes import require_shareable
from service.catalogue import Catalogue
from service.db import clock
from service.errors import StartError
from service.service import Service
from service.settings import ModelSetting, Settings

ROOT = Path(__file__).parents[3]
PACKAGES = ("api", "service", "worker", "migrations", "tools", "benchmarks")
MAINS: tuple[Callable[[], object], ...] = (
    api.server.main,
    api.stack.__main__.main,
    service.db.migrate.main,
    worker.local.main,
    worker.sweeper.main,
)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the signal handlers that a worker replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__module__)
def test_every_entry_point_names_an_invalid_setting(
    main: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFUSION_PORT", "abc")
    monkeypatch.setattr(sys, "argv", ["program", *(["--alone"] if main is worker.local.main else [])])
    with pytest.raises(SystemExit, match=r"^cannot start: DFUSION_PORT: .*$"):
        main()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DFUSION_LEASE_SECOND", "DFUSION_LEASE_SECONDS"),
        ("DFUSION_DATABASE", "DFUSION_DATABASE_URL"),
        ("dfusion_batchsize", "DFUSION_BATCH_SIZE"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_misspelled_setting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, meant: str, in_file: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if in_file:
        (tmp_path / ".env").write_text(f"{name}=60\n")
    else:
        monkeypatch.setenv(name, "60")
    with pytest.raises(StartError, match=f"^{name}: unknown setting; did you mean {meant}[?]$"):
        Settings.read()


@pytest.mark.parametrize("name", ["DFUSION_URL", "DFUSION_API_KEY", "DFUSION_SERVICE_HOST", "DFUSION_PORT_80_TCP"])
def test_variables_of_other_programs_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "x")
    Settings.read()


def test_the_transfer_names_an_invalid_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DFUSION_PORT", "abc")
    with pytest.raises(SystemExit, match=r"^cannot start: DFUSION_PORT: .*$"):
        service.transfer.__main__.main(["import", str(tmp_path / "archive")])


@pytest.mark.slow
def test_no_module_reads_the_settings_without_naming_the_invalid_one() -> None:
    """`Settings()` raises an error of pydantic; `Settings.read` and `Settings.or_exit` name the variable."""
    calls = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text("utf-8")))
            calls += [f"{file}:{n.lineno}" for n in nodes if isinstance(n, ast.Call) and ast.unparse(n) == "Settings()"]
    assert calls == []


def test_a_health_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"^DFUSION_HEALTH_FILE: .* got {tmp_path}/nowhere$"):
        Service.open(Settings(data_dir=tmp_path, health_file=str(tmp_path / "nowhere" / "health")))


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(StartError, match=f"^DFUSION_DATA_DIR: {tmp_path}/data: "):
        Service.open(Settings(data_dir=tmp_path / "data"))
    monkeypatch.setenv("DFUSION_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(SystemExit, match=f"^cannot migrate the database: DFUSION_DATA_DIR: {tmp_path}/data: "):
        service.db.migrate.main()


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.db").write_text("not a database " * 1000)
    url = f"sqlite:///{tmp_path / 'text.db'}"
    with pytest.raises(StartError, match=r"^DFUSION_DATABASE_URL: file is not a database$"):
        Service.open(Settings(data_dir=tmp_path, database_url=url))
    monkeypatch.setenv("DFUSION_DATABASE_URL", url)
    monkeypatch.setenv("DFUSION_DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^cannot migrate .*: DFUSION_DATABASE_URL: file is not a database$"):
        service.db.migrate.main()

    nowhere = "postgresql://dfusion:secret@127.0.0.1:1/dfusion"
    with pytest.raises(StartError, match=r"^DFUSION_DATABASE_URL: .*Connection refused") as refused:
        Service.open(Settings(data_dir=tmp_path, database_url=nowhere))
    assert "secret" not in str(refused.value)


def test_unknown_scorers_of_a_model_are_named() -> None:
    models: dict[str, str | ModelSetting] = {"own": ModelSetting(source="folder", watch="nobody-knows")}
    with pytest.raises(StartError, match=r"^DFUSION_MODELS: own: watch: expected one of .*, got 'nobody-knows'$"):
        Catalogue.of(Settings(models=models))


def test_an_address_that_cannot_be_used_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartError, match=f"^DFUSION_HOST=127.0.0.1, DFUSION_PORT={port}: .*in use"):
            api.server.require_address(Settings(port=port))
    api.server.require_address(Settings(port=port))


POSTGRES = "postgresql://127.0.0.1:1/dfusion"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "SQLite allows one process; set DFUSION_DATABASE_URL "),
        ({"DATABASE_URL": POSTGRES}, "with an embedded worker, .*; set DFUSION_BROKER_URL "),
        (
            {"DATABASE_URL": POSTGRES, "EMBEDDED_WORKER": "false", "REQUESTS_PER_SECOND": "1"},
            "the processes count requests together in Redis; set DFUSION_BROKER_URL",
        ),
    ],
)
def test_what_prevents_several_processes_is_named(
    variables: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFUSION_DATA_DIR", str(tmp_path))
    for name, value in ({"API_PROCESSES": "4"} | variables).items():
        monkeypatch.setenv(f"DFUSION_{name}", value)
    with pytest.raises(SystemExit, match=f"^cannot start: DFUSION_API_PROCESSES=4: {reason}[^\n]*$"):
        api.server.main()


def test_several_processes_need_no_broker_without_rate_limits() -> None:
    require_shareable(Settings(database_url=POSTGRES, embedded_worker=False, api_processes=4))


def test_a_clock_that_differs_from_that_of_the_database_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Service.open(Settings(data_dir=tmp_path))
    real_time = time.time
    with opened.uow.reading() as session:
        assert clock.clock_problem(session) is None
        for seconds, direction in ((100, "ahead of"), (-100, "behind")):
            monkeypatch.setattr(time, "time", lambda seconds=seconds: real_time() + seconds)
            problem = clock.clock_problem(session)
            assert problem is not None and f"{direction} that of the database" in problem
    opened.close()


def test_an_experiment_says_why_its_service_did_not_start(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    log.write_text("one\ncannot start: DFUSION_PORT: no\nApplication startup failed. Exiting.\n")
    assert local_service._reason(log) == "cannot start: DFUSION_PORT: no"
