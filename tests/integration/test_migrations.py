import multiprocessing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from api.core.errors import UnknownRevisionError
from api.core.migrate import migrate
from api.core.tables import Table
from api.core.unit_of_work import make_engine


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'dfusion.db'}"


def test_migrations_make_the_tables_that_the_code_knows(tmp_path: Path) -> None:
    engine = make_engine(url(tmp_path))
    migrate(engine, tmp_path / "lock")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_a_database_of_an_unknown_revision_is_left_alone(tmp_path: Path) -> None:
    engine = make_engine(url(tmp_path))
    migrate(engine, tmp_path / "lock")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    with pytest.raises(UnknownRevisionError, match="from-the-future"):
        migrate(engine, tmp_path / "lock")
    engine.dispose()


def _migrate(folder: Path) -> None:
    engine = make_engine(url(folder))
    migrate(engine, folder / "lock")
    engine.dispose()


def test_processes_that_migrate_at_once_wait_for_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_migrate, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_sqlite_is_set_up_to_keep_what_it_commits(tmp_path: Path) -> None:
    engine = make_engine(url(tmp_path))
    with engine.connect() as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in PRAGMAS}
    assert pragmas == PRAGMAS
    engine.dispose()


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
