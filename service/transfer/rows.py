"""Rows as lines of JSON: the exported tables, the order of their import, and the columns that are filled last."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Column, RowMapping
from sqlalchemy import Table as SqlTable

from service.db.tables import Table
from service.ids import IdKind

Row = dict[str, Any]

_T = Table.metadata.tables
PROMPT_SETS = _T["prompt_sets"]
MODELS = _T["models"]
MODEL_ALIASES = _T["model_aliases"]
JOBS = _T["jobs"]
STAGES = _T["stages"]
ARTIFACTS = _T["artifacts"]
EVENTS = _T["events"]
TABLES: tuple[SqlTable, ...] = (
    PROMPT_SETS,
    MODELS,
    JOBS,
    _T["job_sources"],
    _T["job_prompt_sets"],
    STAGES,
    _T["stage_dependencies"],
    ARTIFACTS,
    _T["samples"],
    _T["scores"],
    _T["pairs"],
    _T["pair_verdicts"],
    _T["metrics"],
    MODEL_ALIASES,
    _T["exports"],
    _T["preference_tests"],
    _T["preference_questions"],
    _T["preference_answers"],
    _T["previews"],
    EVENTS,
)
"""The exported tables. A row references only rows of earlier tables, except in `late_columns`."""

_LOCAL_COLUMNS = {
    ("events", "id"),
    ("jobs", "deleted_at"),
    ("jobs", "events_removed_at"),
    ("jobs", "purge_at"),
    ("jobs", "storage_bytes"),
    ("jobs", "trajectories_kept"),
    ("stages", "checkpoint_bytes"),
    ("stages", "collected_at"),
    ("stages", "fair_key"),
}
"""Columns whose values each installation assigns itself, and the API key of a stage; not exported."""
_POSITION = {table.name: position for position, table in enumerate(TABLES)}
_REPLACED = re.compile(rf"(?:{IdKind.MODEL}|{IdKind.PROMPT_SET})_[0-9a-z]{{26}}")


def columns(table: SqlTable) -> list[Column[Any]]:
    """The exported columns, by name."""
    exported = [column for column in table.columns if (table.name, column.key) not in _LOCAL_COLUMNS]
    return sorted(exported, key=lambda column: column.key)


def target_of(column: Column[Any]) -> SqlTable | None:
    """The table that a foreign key references; None for other columns."""
    return next((key.column.table for key in column.foreign_keys), None)


def late_columns(table: SqlTable) -> list[str]:
    """Columns that reference rows of the same or later tables. They are filled when those exist."""
    late = []
    for column in columns(table):
        target = target_of(column)
        if target is not None and _POSITION.get(target.name, -1) >= _POSITION[table.name]:
            late.append(column.key)
    return late


def key_of(table: SqlTable, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The primary key of a row."""
    return tuple(row[column.key] for column in table.primary_key.columns)


def as_moved(table: SqlTable, row: RowMapping) -> Row:
    """The exported columns of a selected row. References to tables that are not exported become None."""
    exported = {column.key: row[column] for column in columns(table)}
    for column in columns(table):
        target = target_of(column)
        if target is not None and target.name not in _POSITION:
            exported[column.key] = None
    return exported


def to_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON. Equal rows give equal lines."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def read_lines(file: Path, ids: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a file.

    Args:
        file: One JSON object per line.
        ids: Ids to replace everywhere in a row, by id in the file.

    Raises:
        ValueError: A line is not a JSON object.
    """
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(_REPLACED.sub(lambda match: ids.get(match[0], match[0]), line) if ids else line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {line[:100]!r}")
            yield row
