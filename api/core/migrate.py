"""Bring the database to the newest revision; a database of an unknown revision is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from api.core.errors import UnknownRevisionError
from api.core.locks import file_lock

_SCRIPTS = Path(__file__).resolve().parents[2] / "migrations"
_WAIT_SECONDS = 60.0


def migrate(engine: Engine, lock: Path) -> None:
    """Run the migrations that are due, one process at a time. Raises UnknownRevisionError."""
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with file_lock(lock, _WAIT_SECONDS), engine.connect() as connection, _loose_tables(connection):
        present = set(MigrationContext.configure(connection).get_current_heads())
        connection.rollback()
        if present - known:
            raise UnknownRevisionError(
                f"the database is at revision {', '.join(sorted(present))}, which this version does not know: "
                "it was made by a newer one"
            )
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
        connection.commit()


@contextmanager
def _loose_tables(connection: Connection) -> Iterator[None]:
    """SQLite changes a table by copying it into a new one of its name; meanwhile nothing may hold on to the old."""
    raw = connection.connection.driver_connection
    if connection.dialect.name != "sqlite" or raw is None:
        yield
        return
    raw.execute("PRAGMA foreign_keys=OFF")  # has no effect within a transaction, so it cannot be in the migration
    try:
        yield
    finally:
        connection.rollback()
        raw.execute("PRAGMA foreign_keys=ON")
