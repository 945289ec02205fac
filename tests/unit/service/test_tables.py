"""Rules that hold for all tables."""

from __future__ import annotations

from sqlalchemy import Table as SqlTable
from sqlalchemy import UniqueConstraint

from service.db.tables import Table

WITHOUT_INDEX: dict[str, str] = {}
"""Foreign keys without an index, each with the reason."""


def first_columns(table: SqlTable) -> set[str]:
    """The first columns of the table's complete indexes, unique constraints and primary key."""
    complete = [index for index in table.indexes if index.dialect_options["sqlite"]["where"] is None]
    unique = [constraint for constraint in table.constraints if isinstance(constraint, UniqueConstraint)]
    keys = [index.columns for index in complete] + [constraint.columns for constraint in unique]
    return {next(iter(columns)).name for columns in (*keys, table.primary_key.columns)}


def test_each_foreign_key_has_an_index() -> None:
    """Without one, deleting a row reads each referencing table as a whole."""
    missing = {
        f"{table.name}.{column.name}"
        for table in Table.metadata.tables.values()
        for column in table.columns
        if column.foreign_keys and column.name not in first_columns(table)
    }
    assert missing == set(WITHOUT_INDEX)
