"""`python -m tests.contract`: the long test of the API contract, on SQLite and on PostgreSQL."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.contract.generated import known_ids, run_schemathesis
from tests.contract.records import Run, fill, load, save, table
from tests.contract.site import Siege, contract_site
from tests.deployment import DEPLOYED, EMBEDDED
from tests.faults.records import machine
from tests.faults.site import saved_pipeline

EXAMPLES = 160
"""By chance, for each operation and kind of request."""
CASES = 10_000
"""At least."""
_MAX_SHOWN = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 if a check failed."""
    options = _options(arguments)
    if options.table:
        runs = load(options.records)
        if runs:
            options.table.write_text(fill(options.table.read_text("utf-8"), runs), "utf-8")
        else:
            _say(f"{options.table} keeps its table: there are no runs in {options.records}")
        return 0

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only slow these small nets down
    failures = 0
    with saved_pipeline() as pipeline:
        for mode in options.modes:
            run = _run(mode, pipeline, options.records)
            save(options.records, run)
            failures += run.failures
    _say(table(load(options.records)))
    return 1 if failures else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    modes = [EMBEDDED, DEPLOYED]
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"{' or '.join(modes)}; both by default")
    parser.add_argument("--records", type=Path, default=Path("build/contract"), help="folder of the records and logs")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="write the table into this page, and run nothing")
    options = parser.parse_args(arguments)
    options.modes = options.modes or modes
    if unknown := set(options.modes) - set(modes):
        parser.error(f"unknown modes: {', '.join(sorted(unknown))}")
    return options


def _run(mode: str, pipeline: Path, records: Path) -> Run:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contract_site(mode, Path(folder), pipeline) as installation:
        # 1. hostile requests
        known = known_ids(installation)
        siege = Siege(installation)
        _say(f"{mode}: hostile requests")
        siege.attack()
        _say(f"{mode}: {sum(siege.attacker.groups.values())} hostile requests, {len(siege.failures)} failures")
        for failure in siege.failures[:_MAX_SHOWN]:
            _say(f"FAILED: {failure}")

        # 2. generated requests
        generated = run_schemathesis(installation, known, EXAMPLES)
        failures = []
        try:
            generated.require_success(CASES)
        except AssertionError as error:
            failures.append(str(error))
        _say(f"{mode}: {generated.cases} generated cases, {len(failures)} failures")

        # 3. use of what was deleted
        siege.use_after_delete()
        siege.check_logs()
        failures += siege.failures
        records.mkdir(parents=True, exist_ok=True)
        (records / f"{mode}.log").write_text(installation.logs(), "utf-8")
        (records / f"{mode}-failures.txt").write_text("\n\n".join(failures), "utf-8")

    statuses = generated.statuses + siege.attacker.statuses
    slowest_seconds, slowest = max(generated.slowest, siege.attacker.slowest)
    for failure in failures[:_MAX_SHOWN]:
        _say(f"FAILED: {failure}")
    _say(f"{mode}: {len(failures)} failures; responses by status: {_counts(statuses)}")
    _say(f"{mode}: hostile requests: {_counts(siege.attacker.groups)}")
    _say(f"{mode}: slowest request: {slowest_seconds:.2f} s: {slowest}")
    _say(f"{mode}: slowest GET /healthz during the attack: {siege.watcher.slowest[0]:.2f} s")
    return Run(
        mode,
        generated.cases,
        dict(siege.attacker.groups),
        generated.operations,
        {str(status): count for status, count in sorted(statuses.items())},
        len(failures),
        round(slowest_seconds, 2),
        slowest,
        round(time.monotonic() - started),
        machine(),
        datetime.now(UTC).date().isoformat(),
    )


def _counts(counter: Counter[int] | Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items(), key=lambda item: str(item[0])))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
