"""Run by Alembic. The connection comes from api.core.migrate; from the command line, the settings' database."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from api.core.settings import Settings
from api.core.tables import Table
from api.core.unit_of_work import make_engine


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Table.metadata)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with make_engine(Settings().database).begin() as own:
        _run(own)
