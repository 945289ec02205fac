"""`python -m tests.faults`: run the rounds that are not recorded yet, and print the table of all.

A round that failed is repeated with its seed. `--seed` repeats rounds by hand and records nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.deployment import ROOT
from tests.faults.families import FAMILIES, Family
from tests.faults.records import Records, Round, fill, machine, table
from tests.faults.site import Setup, Site, UnavailableError, saved_pipeline, site

RECORDS = Path(__file__).parent / "records"
_ROUNDS_PER_SITE = 25
"""The check of the invariants takes longer with each job, so an installation is replaced after these rounds."""


@dataclass(frozen=True)
class Planned:
    """A round that is to be run."""

    family: Family
    mode: str
    number: int
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 if a round failed."""
    options = _options(arguments)
    records = Records(options.records)
    families = [family for family in FAMILIES if not options.families or family.name in options.families]
    if options.table:
        options.table.write_text(fill(options.table.read_text("utf-8"), records), "utf-8")
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that no server stays behind
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only slow these small nets down
    planned = plan(families, records, options.rounds, options.seed)
    is_recorded = options.seed is None
    if options.modes:
        planned = [each for each in planned if each.mode in options.modes]
    failed = 0
    for finished in run(planned, options.logs):
        failed += bool(finished.error)
        if is_recorded:
            records.add(finished)
    if is_recorded:
        _say(table(records))
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    names = [family.name for family in FAMILIES]
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, help="at most this many rounds of each family in each mode")
    parser.add_argument("--modes", nargs="+", choices=["deployed", "embedded"], help="only these modes")
    parser.add_argument("--seed", type=int, help="run rounds with the seeds SEED, SEED + 1 …; records nothing")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--logs", type=Path, default=Path("build/faults"), help="folder for the logs of failed rounds")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="write the table into this page, and run nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.families) - set(names)
    if unknown:
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    return options


def plan(families: Sequence[Family], records: Records, most: int | None, seed: int | None) -> list[Planned]:
    """The rounds without a record, or all if there is a seed, ordered by the installation that they need."""
    planned = []
    for family in families:
        latest = {} if seed is not None else records.latest(family.name)
        for mode, count in family.rounds.items():
            for number in range(count if most is None else min(most, count)):
                done = latest.get((mode, number))
                if done is not None and not done.error:
                    continue
                if seed is not None:
                    own_seed = seed + number
                else:
                    own_seed = done.seed if done is not None else random.SystemRandom().randrange(1_000_000)
                planned.append(Planned(family, mode, number, own_seed))
    order = {_place(each): number for number, each in reversed(list(enumerate(planned)))}
    return sorted(planned, key=lambda each: order[_place(each)])


def _place(planned: Planned) -> tuple[str, Setup]:
    return planned.mode, planned.family.setup


def run(planned: Sequence[Planned], logs: Path) -> Iterator[Round]:
    """Run the rounds, and yield each as it ends. Rounds that this machine cannot run are named and left out."""
    if not planned:
        return
    adapters: dict[str, str] = {}
    unavailable: set[tuple[str, Setup]] = set()
    with saved_pipeline() as pipeline, ExitStack() as stack:
        opened: Site | None = None
        place: tuple[str, Setup] | None = None
        count = 0
        for each in planned:
            if _place(each) in unavailable:
                continue
            if opened is None or place != _place(each) or count == _ROUNDS_PER_SITE:
                stack.close()
                place, count = _place(each), 0
                try:
                    opened = stack.enter_context(site(each.mode, each.family.setup, pipeline, adapters))
                except UnavailableError as error:
                    _say(f"left out: {each.family.name} {each.mode}: {error}")
                    unavailable.add(place)
                    opened = None
                    continue

            finished = _run_round(opened, each, logs)
            count += 1
            yield finished
            if finished.error:  # the installation may be in any state
                stack.close()
                opened = None


def _run_round(opened: Site, each: Planned, logs: Path) -> Round:
    name = f"{each.family.name} {each.mode} {each.number}"
    started = time.monotonic()
    error, faults = "", 0
    try:
        faults = each.family.run(opened, random.Random(each.seed))
        opened.check()
    except Exception as problem:
        error = f"{type(problem).__name__}: {str(problem)[:200]}"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name.replace(' ', '-')}.log"
        log.write_text(f"{traceback.format_exc()}\n{opened.installed.logs()}", "utf-8")
        faults = 0
    seconds = time.monotonic() - started
    outcome = f"FAILED: {error}" if error else f"{faults} faults"
    _say(f"{name}: seed {each.seed}: {outcome}, {seconds:.1f} s")
    today = datetime.now(UTC).date().isoformat()
    return Round(
        each.family.name,
        each.mode,
        each.number,
        each.seed,
        faults,
        round(seconds, 2),
        error,
        machine(),
        today,
        _version(),
    )


def _version() -> str:
    """The commit, with "-dirty" if anything but the records has changed since."""
    commit = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)tests/faults/records")
    return f"{commit}-dirty" if changes else commit or "unknown"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
