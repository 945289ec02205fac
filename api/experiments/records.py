"""What a finished cell found, as a small JSON file."""

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
"""A list without lists and objects in it, as it is indented; a text never holds a line's end."""
Numbers = dict[str, int | float | None]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobFacts(_Part):
    """A job: when and where it ran.

    seconds        from its start to its end
    stage_seconds  time in its stages, by kind, added up over shards
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
    """A round's pairs. `means` are means of the pairs' figures, by dotted name, over those pairs that have them."""

    pairs: int
    targets: int
    adopted: int
    means: Numbers


class TrainingFacts(_Part):
    """A round's training: the model's own figures, and the numbers of every update."""

    figures: dict[str, Any]
    updates: tuple[Numbers, ...]


class RoundFacts(_Part):
    """One round. `images` counts samples used for training up to its end; `model` is None if nothing was trained."""

    round: int
    images: int
    model: str | None
    metrics: tuple[MetricFacts, ...]
    pairs: PairFacts
    training: TrainingFacts | None


class ScoreFacts(_Part):
    """A model's scores: for each prompt of the split, in the order of `Record.prompts`, the mean over its images."""

    round: int
    images: int
    model: str
    split: str
    scorer: str
    version: str
    means: tuple[float, ...]


class Record(_Part):
    """A finished cell.

    key       of its settings
    settings  all of them, as they were resolved when it ran
    service   the version of the service
    devices   what the service's workers ran on when the record was written
    jobs      "round" and "evaluation"
    prompts   by split
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
        """Whether it records this cell: its settings, read by this version, are the cell's.

        A setting that is newer than the record has its default there, so that a new setting makes no record stale.
        """
        try:
            return CellSettings.model_validate(self.settings) == cell.settings
        except ValidationError:
            return False


def folder_of(out: Path, experiment: str) -> Path:
    """Where an experiment's records are."""
    return out / experiment


def read_record(file: Path) -> Record:
    """Raises RecordError for a file that holds no record, OSError."""
    try:
        return Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise RecordError(f"{file} is no record of a cell: {place}: {problem['msg']}") from error


def record_of(folder: Path, cell: Cell) -> Record | None:
    """The cell's record; None if there is none, or one of other settings. Raises RecordError, OSError."""
    file = folder / cell.file_name
    if not file.exists():
        return None
    record = read_record(file)
    return record if record.is_of(cell) else None


def write_record(folder: Path, cell: Cell, record: Record) -> Path:
    """Write the record under the cell's name: whole, or not at all."""
    file = folder / cell.file_name
    write_text(file, json_text(record.model_dump(mode="json")))
    return file


def json_text(content: Any) -> str:
    """JSON for people and for version control: indented, but lists of numbers or texts on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return (
        _FLAT_LIST.sub(lambda match: "[" + ", ".join(part.strip() for part in match[1].split(",\n")) + "]", text) + "\n"
    )


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, "utf-8")
    part.replace(file)


def flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | None]]:
    """Numbers of nested objects by dotted names; None stays, anything else is left out."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield f"{prefix}{name}", value
