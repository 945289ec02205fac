"""Run by Alembic. The connection comes from service.db.migrate; from the command line, the settings' database."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from service.db.tables import Table
from service.db.unit_of_work import make_engine
from service.settings import Settings


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Table.metadata)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with make_engine(Settings.or_exit().database).begin() as own:
        _run(own)
