"""Records: the results of finished cells, as small JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from api.experiments.cells import Cell
from api.experiments.errors import RecordError
from api.experiments.format import CellSettings

_FLAT_LIST = re.compile(r"\[\n([^\[\]{}]*?)\n\s*\]")
"""An indented list of scalars; JSON strings contain no line breaks."""
Numbers = dict[str, int | float | None]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobFacts(_Part):
    """A job with its times.

    seconds        time from start to end
    stage_seconds  time of its stages by kind, summed over shards
    """

    id: str
    origin: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    seconds: float | None
    stage_seconds: dict[str, float]


class MetricFacts(_Part):
    """Mean and standard deviation of a scorer over a round's images."""

    split: str
    scorer: str
    version: str
    count: int
    mean: float
    std: float


class PairFacts(_Part):
    """A round's pairs. `means` are means of the pairs' statistics by dotted name, over the pairs that have them."""

    pairs: int
    targets: int
    adopted: int
    means: Numbers


class TrainingFacts(_Part):
    """A round's training. `figures`: the statistics of the model; `updates`: the numbers of every update."""

    figures: dict[str, Any]
    updates: tuple[Numbers, ...]


class RoundFacts(_Part):
    """One round. `images` counts the training images up to its end; `model` is None if nothing was trained."""

    round: int
    images: int
    model: str | None
    metrics: tuple[MetricFacts, ...]
    pairs: PairFacts
    training: TrainingFacts | None


class ScoreFacts(_Part):
    """A model's scores: the mean over images for each prompt, in the order of `Record.prompts`."""

    round: int
    images: int
    model: str
    split: str
    scorer: str
    version: str
    means: tuple[float, ...]


class Record(_Part):
    """A finished cell.

    key       digest of the settings
    settings  all settings, as they were resolved when the cell ran
    service   version of the service
    devices   devices of the service's workers when the record was written
    jobs      the jobs "round" and "evaluation"
    prompts   prompts by split
    """

    format: Literal[1] = 1
    experiment: str
    list: str
    arm: str
    seed: int | None
    key: str
    settings: dict[str, Any]
    service: str
    devices: tuple[str, ...]
    jobs: dict[str, JobFacts]
    prompts: dict[str, tuple[str, ...]]
    rounds: tuple[RoundFacts, ...]
    scores: tuple[ScoreFacts, ...]

    def is_of(self, cell: Cell) -> bool:
        """Whether the record belongs to this cell, that is, whether the settings have the same key.

        Settings that are newer than the record have their defaults, so that a new setting makes no record stale.
        """
        try:
            return CellSettings.model_validate(self.settings).key == cell.settings.key
        except ValidationError:
            return False


def folder_of(out: Path, experiment: str) -> Path:
    """Return the folder of an experiment's records."""
    return out / experiment


def read_record(file: Path) -> Record:
    """Read a record. Raises RecordError if the file is invalid, OSError if it cannot be read."""
    try:
        return Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join(map(str, problem["loc"]))
        raise RecordError(f"{file} is not a valid record: {path}: {problem['msg']}") from error


def record_of(folder: Path, cell: Cell) -> Record | None:
    """Read the cell's record. Returns None if it is missing or has other settings. Raises RecordError, OSError."""
    file = folder / cell.file_name
    if not file.exists():
        return None
    record = read_record(file)
    return record if record.is_of(cell) else None


def write_record(folder: Path, cell: Cell, record: Record) -> Path:
    """Write the record atomically under the cell's name. Returns its file."""
    file = folder / cell.file_name
    write_text(file, json_text(record.model_dump(mode="json")))
    return file


def json_text(content: Any) -> str:
    """Format JSON for reading and version control: indented, with lists of scalars on one line."""

    def join_lines(match: re.Match[str]) -> str:
        return "[" + ", ".join(map(str.strip, match[1].split(",\n"))) + "]"

    text = json.dumps(content, indent=1, ensure_ascii=False)
    return _FLAT_LIST.sub(join_lines, text) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: under a temporary name, which is then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, "utf-8")
    part.replace(file)


def flatten(statistics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | None]]:
    """Yield the numbers and None values of nested objects by dotted name. Skips other values."""
    for name, value in statistics.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield f"{prefix}{name}", value
