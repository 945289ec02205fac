"""Bring the database to the newest revision; a database of an unknown revision is left alone.

`python -m service.db.migrate` does so for the settings' database, and nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from service.db.locks import AdvisoryLock
from service.db.unit_of_work import make_engine
from service.errors import StartError, UnknownRevisionError
from service.file_lock import file_lock
from service.settings import Settings

_SCRIPTS = Path(__file__).resolve().parents[2] / "migrations"
_TABLE = "alembic_version"
_UNRELEASED = frozenset(f"{number:04}" for number in range(1, 11))
"""Revisions of the versions before 0.1.0, which no migration leads on from."""

_WAIT_SECONDS = 600.0
_LOOK_SECONDS = 0.05


def migrate(engine: Engine, lock: Path) -> None:
    """Run the migrations that are due, one process at a time. Raises StartError, also UnknownRevisionError.

    SQLite's processes are on one machine and share the file `lock`; PostgreSQL's share a lock of the database's.
    """
    with _alone(engine, lock) as connection:
        _upgrade(_config(), connection)


def revisions(connection: Connection) -> tuple[frozenset[str], frozenset[str]]:
    """The database's revision and the one that this version makes; each a set, for there may be none."""
    return _present(connection), frozenset(ScriptDirectory.from_config(_config()).get_heads())


def _present(connection: Connection) -> frozenset[str]:
    """What alembic's own context would say, which writes two lines into the log at every look."""
    if not inspect(connection).has_table(_TABLE):
        return frozenset()
    return frozenset(connection.scalars(text(f"SELECT version_num FROM {_TABLE}")))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def _upgrade(config: Config, connection: Connection) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    present = _present(connection)
    connection.rollback()
    if present - known:
        raise UnknownRevisionError(_reason(present))

    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
    connection.commit()


def _reason(present: frozenset[str]) -> str:
    """Why a database at an unknown revision cannot be migrated, and what to do."""
    at = f"the database is at revision {', '.join(sorted(present))}"
    if present <= _UNRELEASED:
        return (
            f"{at}, created by a version before 0.1.0, and cannot be upgraded: export the models to keep with that "
            "version (`dfusion models export`), then start with an empty database and an empty data folder"
        )
    return f"{at}, which this version does not know: it was created by a newer version; start that one"


@contextmanager
def _alone(engine: Engine, lock: Path) -> Iterator[Connection]:
    """A connection, while no other process migrates."""
    if engine.dialect.name != "postgresql":
        with file_lock(lock, _WAIT_SECONDS), engine.connect() as connection, _loose_tables(connection):
            yield connection
        return
    with engine.connect() as connection:
        connection.detach()  # the session ends with the connection: its lock and its time limits go with it
        for limit in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(text(f"SET {limit} = 0"))
        connection.commit()
        _wait_for_lock(connection)
        yield connection


@contextmanager
def _loose_tables(connection: Connection) -> Iterator[None]:
    """SQLite changes a table by copying it into a new one of its name; meanwhile nothing may hold on to the old."""
    raw = connection.connection.driver_connection
    if raw is None:
        raise StartError("the database's connection was lost before its migration")
    raw.execute("PRAGMA foreign_keys=OFF")  # has no effect within a transaction, so it cannot be in the migration
    try:
        yield
    finally:
        connection.rollback()
        raw.execute("PRAGMA foreign_keys=ON")


def _wait_for_lock(connection: Connection) -> None:
    """Take the database's lock for migrations, which the session holds. Raises StartError."""
    deadline = time.monotonic() + _WAIT_SECONDS
    query, key = text("SELECT pg_try_advisory_lock(:key)"), {"key": AdvisoryLock.MIGRATION.value}
    while not connection.scalar(query, key):
        connection.commit()
        if time.monotonic() >= deadline:
            raise StartError(f"another process has been migrating the database for {_WAIT_SECONDS:.0f} s")
        time.sleep(_LOOK_SECONDS)
    connection.commit()


def main() -> None:
    """Migrate the settings' database; ends with a message and exit code 1 where that cannot be."""
    settings = Settings.or_exit()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    engine = make_engine(settings.database)
    try:
        migrate(engine, settings.data_dir / "migrate.lock")
    except StartError as error:
        sys.exit(f"cannot migrate the database: {error}")
    except DBAPIError as error:
        sys.exit(f"cannot migrate the database: {error.orig}")
    finally:
        engine.dispose()


if __name__ == "__main__":
    main()
