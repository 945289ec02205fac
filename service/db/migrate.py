"""Migrate the database to the newest revision. A database of an unknown revision is not changed.

`python -m service.db.migrate` migrates the database of the settings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from service.db.locks import AdvisoryLock, try_hold
from service.db.unit_of_work import WITHOUT_LIMITS, first_line, make_engine
from service.errors import StartError, UnknownRevisionError
from service.file_lock import file_lock
from service.settings import Settings

_SCRIPTS = Path(__file__).resolve().parents[2] / "migrations"
_TABLE = "alembic_version"
_UNRELEASED = frozenset(f"{number:04}" for number in range(1, 11))
"""Revisions of the versions before 0.1.0, which no migration leads on from."""

_NO_RIGHT = "42501"
"""SQLSTATE insufficient_privilege."""
_WAIT_SECONDS = 600.0
_POLL_SECONDS = 0.05


def migrate(engine: Engine, lock: Path) -> None:
    """Run the pending migrations, one process at a time.

    Args:
        engine: The database.
        lock: The lock file of SQLite, whose processes share a machine. PostgreSQL uses an advisory lock.

    Raises:
        UnknownRevisionError: The database has a revision that this version does not know.
        StartError: Another process holds the lock, the connection was lost, or the role may not migrate.
    """
    # PostgreSQL needs no lock and no further rights if nothing is pending
    if engine.dialect.name == "postgresql" and _is_newest(engine):
        return
    with _exclusive(engine, lock) as connection:
        _upgrade(connection)


def require_newest(engine: Engine) -> None:
    """Raises StartError if the schema is not that of this version. For processes that do not migrate."""
    with engine.connect() as connection:
        present, newest = revisions(connection)
    if present - _known():
        raise UnknownRevisionError(_reason(present))
    if present != newest:
        raise StartError(
            f"the database is at revision {', '.join(sorted(present)) or 'none'}, this version needs "
            f"{', '.join(sorted(newest))}: start the service, or run `python -m service.db.migrate`"
        )


def _is_newest(engine: Engine) -> bool:
    with engine.connect() as connection:
        present, newest = revisions(connection)
    return present == newest


def revisions(connection: Connection) -> tuple[frozenset[str], frozenset[str]]:
    """The revision of the database, and the newest revision of this version. A new database has none."""
    return _current(connection), _newest()


def _newest() -> frozenset[str]:
    return _revisions_in(_SCRIPTS)[0]


def _known() -> frozenset[str]:
    return _revisions_in(_SCRIPTS)[1]


@cache
def _revisions_in(scripts: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The newest revision of a folder of migrations, and all of them. Cached: alembic imports every file each time."""
    folder = ScriptDirectory(str(scripts))
    return frozenset(folder.get_heads()), frozenset(script.revision for script in folder.walk_revisions())


def _current(connection: Connection) -> frozenset[str]:
    """The revision of the database. alembic's own query would write two log lines each time."""
    if not inspect(connection).has_table(_TABLE):
        return frozenset()
    return frozenset(connection.scalars(text(f"SELECT version_num FROM {_TABLE}")))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def _upgrade(connection: Connection) -> None:
    current = _current(connection)
    connection.rollback()
    if current - _known():
        raise UnknownRevisionError(_reason(current))
    if current == _newest():
        return

    config = _config()
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, "head")
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _NO_RIGHT:
            raise
        message = "run `python -m service.db.migrate` with the role that owns the tables (docs/deploy.md)"
        raise StartError(f"this role may not migrate the database: {message}") from error
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
def _exclusive(engine: Engine, lock: Path) -> Iterator[Connection]:
    """A connection that holds the lock for migrations."""
    if engine.dialect.name != "postgresql":
        with file_lock(lock, _WAIT_SECONDS), engine.connect() as connection, _without_foreign_keys(connection):
            yield connection
        return

    with _held_lock(engine), engine.connect() as connection:
        yield connection.execution_options(**{WITHOUT_LIMITS: True})


@contextmanager
def _held_lock(engine: Engine) -> Iterator[None]:
    """Hold the lock for migrations in PostgreSQL. Raises StartError."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        with try_hold(engine, AdvisoryLock.MIGRATION) as is_held:
            if is_held:
                yield
                return
        if time.monotonic() >= deadline:
            raise StartError(f"another process has been migrating the database for {_WAIT_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _without_foreign_keys(connection: Connection) -> Iterator[None]:
    """Disable foreign keys of SQLite, since it alters a table by copying it into a new one."""
    raw = connection.connection.driver_connection
    if raw is None:
        raise StartError("the connection to the database was lost before the migration")

    raw.execute("PRAGMA foreign_keys=OFF")  # has no effect within a transaction, so it cannot be in the migration
    try:
        yield
    finally:
        connection.rollback()
        raw.execute("PRAGMA foreign_keys=ON")


def main() -> None:
    """Migrate the database of the settings. Exits with a message and status 1 on failure."""
    settings = Settings.or_exit()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot migrate the database: DFUSION_DATA_DIR: {settings.data_dir}: {error.strerror}")
    engine = make_engine(settings.database)
    try:
        migrate(engine, settings.data_dir / "migrate.lock")
    except StartError as error:
        sys.exit(f"cannot migrate the database: {error}")
    except DBAPIError as error:
        sys.exit(f"cannot migrate the database: DFUSION_DATABASE_URL: {first_line(error)}")
    finally:
        engine.dispose()


if __name__ == "__main__":
    main()
