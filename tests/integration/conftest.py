"""Fixtures of integration tests. One thread, since more threads only slow these small nets down."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import PostgresServer, S3Server, postgres_server, s3_server
from tests.service import migrated_template, models_loaded_once, tables_by_copy


def pytest_collectstart() -> None:
    """Import torch where tests are collected. pytest-xdist's first process collects none, and would need seconds."""
    import torch

    from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Create SQLite databases by copying a migrated one."""
    with tables_by_copy(tmp_path_factory.mktemp("tables")):
        yield


@pytest.fixture(scope="session", autouse=True)
def _models() -> Iterator[None]:
    with models_loaded_once():
        yield


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random pipeline. Without a middle block, jobs take a tenth less time."""
    from tests.nets import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(has_middle=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a middle block."""
    from tests.nets import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server, with a separate bucket per test."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for all tests, with a separate database per test."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def new_postgres_database(postgres: PostgresServer) -> Callable[[], str]:
    """Returns a function that creates a migrated PostgreSQL database and returns its URL."""
    template = migrated_template(postgres)
    return lambda: postgres.create_database(template)


@pytest.fixture
def postgres_url(postgres: PostgresServer, new_postgres_database: Callable[[], str]) -> Iterator[str]:
    """The URL of a migrated PostgreSQL database without rows."""
    url = new_postgres_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The database_url of an empty database, of each kind in turn or of the kind that the test selects."""
    if request.param == "sqlite":
        return ""
    return str(request.getfixturevalue("postgres_url"))
