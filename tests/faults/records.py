"""Records of finished rounds, and the table that summarises them."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.families import FAMILIES, Family

_TABLE = re.compile(r"(<!-- faults -->\n).*?(<!-- end of faults -->)", re.DOTALL)
_NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes:
        family: The family's name.
        mode: The mode of the installation.
        number: The number of the round in its family and mode, from 0.
        seed: Its seed.
        faults: The number of faults; 0 if the round failed.
        seconds: Its duration, with the check of the invariants.
        error: Why it failed; empty if it passed.
        machine: The processor and the number of cores.
        day: When it ended, as YYYY-MM-DD.
        version: The commit.
    """

    family: str
    mode: str
    number: int
    seed: int
    faults: int
    seconds: float
    error: str
    machine: str
    day: str
    version: str


class Records:
    """A folder with a file for each family, with a line for each finished round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, finished: Round) -> None:
        """Append a round. It is on the disk afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{finished.family}.jsonl").open("a+b") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash has cut the last line
                    file.write(b"\n")
            file.write(json.dumps(asdict(finished)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, family: str) -> list[Round]:
        """All rounds of a family, as they ended. A line that was cut by a crash is skipped."""
        path = self.folder / f"{family}.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return list(_parsed(lines))

    def latest(self, family: str) -> dict[tuple[str, int], Round]:
        """The last run of each round of a family, by mode and number."""
        return {(finished.mode, finished.number): finished for finished in self.of(family)}


def _parsed(lines: Iterable[str]) -> Iterator[Round]:
    for line in lines:
        try:
            yield Round(**json.loads(line))
        except json.JSONDecodeError:
            continue


def machine() -> str:
    """The processor of this machine and the number of its cores."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = re.findall(r"^model name\s*: (.+)$", information.read_text("utf-8"), re.MULTILINE)
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def table(records: Records) -> str:
    """The table of all families, in Markdown."""
    lines = [
        "| fault | rounds | passed | failed at first | faults | seconds per round | last run |",
        "|---|--:|--:|--:|--:|--:|---|",
        *(_row(records, family) for family in FAMILIES),
    ]
    machines = sorted({finished.machine for family in FAMILIES for finished in records.of(family.name)})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines) or _NOT_RUN}."])


def _row(records: Records, family: Family) -> str:
    wanted = sum(family.rounds.values())
    latest = records.latest(family.name)
    if not latest:
        return f"| {family.title} (`{family.name}`) | {wanted} | {_NOT_RUN} | | | | |"

    rounds = latest.values()
    passed = [finished for finished in rounds if not finished.error]
    failures = sum(bool(finished.error) for finished in records.of(family.name))
    faults = sum(finished.faults for finished in passed)
    seconds = sum(finished.seconds for finished in rounds) / len(rounds)
    missing = "" if len(latest) >= wanted else f"; {wanted - len(latest)} {_NOT_RUN}"
    last = max(finished.day for finished in rounds)
    return (
        f"| {family.title} (`{family.name}`) | {wanted} | {len(passed)} of {len(latest)}{missing} | {failures} "
        f"| {faults} | {seconds:.1f} | {last} |"
    )


def fill(page: str, records: Records) -> str:
    """The page with the table between its markers. Raises ValueError if it has none."""
    if not _TABLE.search(page):
        raise ValueError("expected the markers <!-- faults --> and <!-- end of faults -->")
    return _TABLE.sub(lambda match: f"{match[1]}{table(records)}\n{match[2]}", page)
