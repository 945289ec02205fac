"""Rows as lines of text: which tables are moved, in which order they can be filled, and which columns come last."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Column
from sqlalchemy import Table as SqlTable

from service.db.tables import Table
from service.ids import IdKind

Row = dict[str, Any]

_T = Table.metadata.tables
PROMPT_SETS, MODELS, MODEL_ALIASES = _T["prompt_sets"], _T["models"], _T["model_aliases"]
JOBS, STAGES, ARTIFACTS, EVENTS = _T["jobs"], _T["stages"], _T["artifacts"], _T["events"]
TABLES: tuple[SqlTable, ...] = (
    PROMPT_SETS,
    MODELS,
    JOBS,
    STAGES,
    _T["stage_dependencies"],
    ARTIFACTS,
    _T["samples"],
    _T["scores"],
    _T["pairs"],
    _T["metrics"],
    MODEL_ALIASES,
    _T["exports"],
    EVENTS,
)
"""Those that are moved. A row's references are to tables before its own, but for those of `late_columns`."""

_OWN_NUMBERS = {("events", "id")}
"""Numbers that every installation gives itself."""
_PLACE = {table.name: place for place, table in enumerate(TABLES)}
_REPLACED = re.compile(rf"(?:{IdKind.MODEL}|{IdKind.PROMPT_SET})_[0-9a-z]{{26}}")


def columns(table: SqlTable) -> list[Column[Any]]:
    """The columns that are moved, by name."""
    found = [column for column in table.columns if (table.name, column.name) not in _OWN_NUMBERS]
    return sorted(found, key=lambda column: column.name)


def target_of(column: Column[Any]) -> SqlTable | None:
    """The table that a column's values are ids of."""
    return next((key.column.table for key in column.foreign_keys), None)


def late_columns(table: SqlTable) -> list[str]:
    """Columns that name rows of the same table or of later ones: filled once those are there."""
    found = [(column.name, target_of(column)) for column in columns(table)]
    return [name for name, target in found if target is not None and _PLACE.get(target.name, -1) >= _PLACE[table.name]]


def key_of(table: SqlTable, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The row's primary key."""
    return tuple(row[column.name] for column in table.primary_key.columns)


def as_moved(table: SqlTable, row: Mapping[str, Any]) -> Row:
    """The row without what belongs to its installation alone: what it names in tables that stay."""
    found = {column.name: row[column.name] for column in columns(table)}
    for column in columns(table):
        target = target_of(column)
        if target is not None and target.name not in _PLACE:
            found[column.name] = None
    return found


def to_line(row: Mapping[str, Any]) -> str:
    """One line of JSON; equal rows give equal lines."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def read_lines(file: Path, ids: Mapping[str, str]) -> Iterator[Row]:
    """The file's rows, with every id that `ids` knows replaced wherever it stands. Raises ValueError for others."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(_REPLACED.sub(lambda found: ids.get(found[0], found[0]), line) if ids else line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a row, got {line[:100]!r}")
            yield row
