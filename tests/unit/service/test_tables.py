"""Rules that hold for all tables."""

from __future__ import annotations

from sqlalchemy import Table as SqlTable
from sqlalchemy import UniqueConstraint

from service.db.tables import Table

WITHOUT_INDEX: dict[str, str] = {}
"""Foreign keys without an index, each with the reason."""


def is_indexed(table: SqlTable, columns: list[str]) -> bool:
    """Whether a complete index, a unique constraint or the primary key begins with these columns."""
    complete = [index for index in table.indexes if index.dialect_options["sqlite"]["where"] is None]
    unique = [constraint for constraint in table.constraints if isinstance(constraint, UniqueConstraint)]
    keys = [index.columns for index in complete] + [constraint.columns for constraint in unique]
    starts = [[column.name for column in key][: len(columns)] for key in (*keys, table.primary_key.columns)]
    return columns in starts


def test_each_foreign_key_has_an_index() -> None:
    """Without one, deleting a row reads each referencing table as a whole."""
    keys = [
        (table, list(key.column_keys))
        for table in Table.metadata.tables.values()
        for key in table.foreign_key_constraints
    ]
    missing = {f"{table.name}.{'.'.join(columns)}" for table, columns in keys if not is_indexed(table, columns)}
    assert missing == set(WITHOUT_INDEX)
