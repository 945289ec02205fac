"""Records of runs of the contract test, and the table that summarises them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.deployment import DEPLOYED, EMBEDDED

_TABLE = re.compile(r"(<!-- contract -->\n).*?(<!-- end of contract -->)", re.DOTALL)
_DATABASES = {EMBEDDED: "SQLite (embedded)", DEPLOYED: "PostgreSQL (deployed)"}


@dataclass(frozen=True)
class Run:
    """A run on one installation.

    Attributes:
        mode: The mode of the installation.
        generated: The number of cases that schemathesis generated.
        hostile: The number of hostile requests by group.
        operations: The number of operations in the OpenAPI document.
        statuses: The number of responses by status; 0 is a connection closed without a response.
        failures: The number of failed checks.
        slowest_seconds: The duration of the slowest request.
        slowest: What it was.
        seconds: The duration of the run.
        machine: The processor and the number of cores.
        day: When it ended, as YYYY-MM-DD.
    """

    mode: str
    generated: int
    hostile: Mapping[str, int]
    operations: int
    statuses: Mapping[str, int]
    failures: int
    slowest_seconds: float
    slowest: str
    seconds: float
    machine: str
    day: str


def save(folder: Path, run: Run) -> None:
    """Write the record of a run, in place of an earlier one of the same mode."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run.mode}.json").write_text(json.dumps(asdict(run), indent=1), "utf-8")


def load(folder: Path) -> list[Run]:
    """Read the recorded runs."""
    paths = [folder / f"{mode}.json" for mode in _DATABASES]
    return [Run(**json.loads(path.read_text("utf-8"))) for path in paths if path.exists()]


def table(runs: list[Run]) -> str:
    """The table of these runs, in Markdown."""
    lines = [
        "| database | generated cases | hostile requests | operations | responses | failures | slowest request | run |",
        "|---|--:|--:|--:|---|--:|---|---|",
        *map(_row, runs),
    ]
    machines = sorted({run.machine for run in runs})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines) or 'not run yet'}."])


def _row(run: Run) -> str:
    classes: Counter[str] = Counter()
    for status, count in run.statuses.items():
        classes["closed without a response" if status == "0" else f"{status[0]}xx"] += count
    classes.setdefault("5xx", 0)
    responses = ", ".join(f"{name}: {count:,}" for name, count in sorted(classes.items()))
    return (
        f"| {_DATABASES[run.mode]} | {run.generated:,} | {sum(run.hostile.values()):,} | {run.operations} "
        f"| {responses} | {run.failures} | {run.slowest_seconds:.1f} s: {run.slowest} "
        f"| {run.day}, {run.seconds / 60:.0f} min |"
    )


def fill(page: str, runs: list[Run]) -> str:
    """The page with the table between its markers. Raises ValueError if it has none."""
    if not _TABLE.search(page):
        raise ValueError("expected the markers <!-- contract --> and <!-- end of contract -->")
    return _TABLE.sub(lambda match: f"{match[1]}{table(runs)}\n{match[2]}", page)
