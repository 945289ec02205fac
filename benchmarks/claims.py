"""Claims against those of version 0.1.0, on PostgreSQL: `python -m benchmarks.claims [--free 80000]`.

1. 100 workers claim at the same time while 300 stages of one job are free. Every worker must get one.
2. One worker with a loaded base model claims while 80,000 stages are free: 80 jobs of 8 API keys on two base models.

Version 0.1.0 read the first eight free stages of all jobs and locked their jobs one after the other. It looked up the
base models of jobs by a join over all free stages.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from sqlalchemy import ColumnElement, case, func, select, text, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries import jobs, stages
from service.db.tables import Job, Model, Stage
from service.db.unit_of_work import UnitOfWork
from service.jobs import execution
from service.settings import Settings
from service.states import StageState
from tests.servers import PostgresServer, postgres_server
from tests.service import migrated_template

CLAIM_MILLISECONDS = 10
_WORKERS = 100
_FREE_STAGES = 300
_MANY_FREE_STAGES = 80_000
_CALLS = 100
_CALLS_OF_OLD_WAY = 20
_CONNECTIONS = 40
"""Connections of one unit of work."""

ClaimFunction = Callable[[UnitOfWork, Settings, str, str | None], bool]
"""Claims a stage for a worker with a loaded base model. Returns whether it got one."""

_FILL = (
    "INSERT INTO models (id, name, base, figures, created_at) "
    "SELECT 'model-' || n, 'base-' || n, 'base-' || n, '{{}}', 0 FROM generate_series(0, 1) n",
    "INSERT INTO jobs (id, kind, state, spec, model_id, rounds, work_total, created_at, started_at) "
    "SELECT 'job_' || lpad(n::text, 26, '0'), 'sampling', 'running', "
    '\'{{"model": "base-0", "prompt_set": "set"}}\', \'model-\' || mod(n, 2), 0, 1, 0, 0 '
    "FROM generate_series(1, {jobs}) n",
    "INSERT INTO stages (id, job_id, number, kind, queue, round, shard, params, work, state, lease_epoch, "
    "progress_done, progress_total, attempt, crash_count, not_before, free_at, hinted_at, created_at, fair_key, base) "
    "SELECT 'stg_' || j || '_' || n, 'job_' || lpad(j::text, 26, '0'), n, 'sample', 'gpu', 0, n - 1, '{{}}', 1, "
    "'queued', 0, 0, 0, 0, 0, 0, extract(epoch from clock_timestamp()), 0, 0, 'key-' || mod(j, 8), "
    "'base-' || mod(j, 2) FROM generate_series(1, {jobs}) j, generate_series(1, {stages}) n",
    # the index that version 0.1.0 used; it has none of the other indexes of free stages
    "CREATE INDEX old_index ON stages (state, unmet, job_id, number)",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--free", type=int, default=_MANY_FREE_STAGES, help="free stages of the second measurement")
    measure(parser.parse_args().free)


def measure(free: int = _MANY_FREE_STAGES) -> None:
    """Print both measurements, each with its alternative, on a temporary server."""
    with postgres_server() as server, tempfile.TemporaryDirectory() as folder:
        settings = Settings(_env_file=None, data_dir=Path(folder), embedded_worker=False)
        template = migrated_template(server)

        # 1. many workers at once
        for name, claim in (("claim", _claim), ("claim of 0.1.0", _claim_as_in_0_1_0)):
            with _filled(server, template, 1, _FREE_STAGES) as url:
                _measure_together(name, url, settings, claim)

        # 2. a loaded model, with many free stages
        with _filled(server, template, 80, free // 80) as url:
            uow = UnitOfWork.connect(url)
            for name, claim, calls in (
                ("claim", _claim, _CALLS),
                ("claim of 0.1.0", _claim_as_in_0_1_0, _CALLS_OF_OLD_WAY),
            ):
                _measure_with_model(f"{name} with a loaded model, {free:,} stages free", uow, settings, claim, calls)
            uow.close()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def _filled(server: PostgresServer, template: str, number_of_jobs: int, stages_per_job: int) -> Iterator[str]:
    """The URL of a database with these jobs, all of whose stages are free."""
    url = server.create_database(template)
    uow = UnitOfWork.connect(url)
    with uow.engine.begin() as connection:
        for statement in _FILL:
            connection.execute(text(statement.format(jobs=number_of_jobs, stages=stages_per_job).replace(":", r"\:")))
    with uow.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))
    uow.close()
    yield url


def _measure_together(name: str, url: str, settings: Settings, claim: ClaimFunction) -> None:
    """All workers claim once, at the same time."""
    with ExitStack() as stack:
        uows = [UnitOfWork.connect(url) for _ in range(_WORKERS // _CONNECTIONS + 1)]
        for uow in uows:
            stack.callback(uow.close)
        barrier = threading.Barrier(_WORKERS, timeout=60)

        def claim_once(number: int) -> tuple[bool, float]:
            uow = uows[number % len(uows)]
            with uow.engine.connect():  # its connection is open before the measurement
                barrier.wait()
            started = time.perf_counter()
            return claim(uow, settings, f"worker-{number}", None), time.perf_counter() - started

        with ThreadPoolExecutor(_WORKERS) as pool:
            results = list(pool.map(claim_once, range(_WORKERS)))

    without_stage = sum(not claimed for claimed, _ in results)
    slowest = max(seconds for _, seconds in results)
    _say(
        f"{name}: of {_WORKERS} workers at once, {without_stage} got none while "
        f"{_FREE_STAGES} stages were free (target: 0); the slowest claim took {slowest:.1f} s"
    )


def _measure_with_model(name: str, uow: UnitOfWork, settings: Settings, claim: ClaimFunction, calls: int) -> None:
    milliseconds = []
    for number in range(calls + 1):
        started = time.perf_counter()
        if not claim(uow, settings, f"worker-{number}", "base-1"):
            raise RuntimeError("nothing was claimed")
        milliseconds.append(1000 * (time.perf_counter() - started))

    percentiles = statistics.quantiles(milliseconds[1:], n=100)
    _say(
        f"{name}: median {percentiles[49]:.1f} ms, 99% within {percentiles[98]:.1f} ms, "
        f"fastest {min(milliseconds):.1f} ms (target: median <= {CLAIM_MILLISECONDS} ms)"
    )


def _claim(uow: UnitOfWork, settings: Settings, owner: str, prefer_base: str | None) -> bool:
    return execution.claim(uow, settings, owner, prefer_base=prefer_base) is not None


# The claim of version 0.1.0


def _claim_as_in_0_1_0(uow: UnitOfWork, settings: Settings, owner: str, prefer_base: str | None) -> bool:
    with uow.reading() as session:
        if session.scalar(select(Stage.id).where(_is_free()).limit(1)) is None:
            return False
    return uow.run(partial(_try_candidates, settings=settings, owner=owner, prefer_base=prefer_base))


def _try_candidates(session: Session, settings: Settings, owner: str, prefer_base: str | None) -> bool:
    for _ in range(3):
        for stage_id, job_id in _candidates(session, prefer_base):
            savepoint = session.begin_nested()
            jobs.lock(session, job_id)
            jobs.start(session, job_id)
            if not _claim_stage(session, stage_id, owner, settings.lease_seconds):
                savepoint.rollback()
                continue

            stage = stages.get(session, stage_id)
            stages.count_shards(session, job_id, stage.round, stage.kind)
            jobs.add_event(session, job_id, "stage.started", "started", stage_id, worker=owner)
            return True
    return False


def _is_free() -> ColumnElement[bool]:
    return (Stage.state == StageState.QUEUED) & (Stage.unmet == 0) & (Stage.not_before <= now_seconds())


def _candidates(session: Session, prefer_base: str | None) -> list[tuple[str, str]]:
    query = select(Stage.id, Stage.job_id).where(_is_free())
    if prefer_base is not None:
        of_base = select(Job.id).join(Model, Model.id == Job.model_id).where(Model.base == prefer_base)
        waited = func.coalesce(Stage.free_at, Stage.not_before) < now_seconds() - 30.0
        query = query.order_by(case((waited | Stage.job_id.in_(of_base), 0), else_=1))
    rows = session.execute(query.order_by(Stage.job_id, Stage.number).limit(8))
    return [(row.id, row.job_id) for row in rows]


def _claim_stage(session: Session, stage_id: str, owner: str, lease_seconds: float) -> bool:
    free = select(Stage.id).where(Stage.id == stage_id, _is_free()).with_for_update(skip_locked=True)
    if session.scalar(free) is None:
        return False

    values = {
        "state": StageState.RUNNING,
        "lease_owner": owner,
        "lease_epoch": Stage.lease_epoch + 1,
        "lease_expires_at": now_seconds() + lease_seconds,
        "attempt": Stage.attempt + 1,
        "started_at": now_seconds(),
    }
    session.execute(update(Stage).where(Stage.id == stage_id).values(values))
    return True


if __name__ == "__main__":
    main()
