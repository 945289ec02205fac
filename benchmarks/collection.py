"""Collections against those of version 0.1.0, on PostgreSQL: `python -m benchmarks.collection [--files 20000]`.

An ended job has 20,000 files of trajectories, each of 16 samples. The setting `keep_trajectories=none` removes them.

1. The collection runs while sweeps are due every second. The longest delay of a sweep is printed.
2. Version 0.1.0 removed 20 files in a transaction, each of which read all samples. The first transactions are measured
   in a copy of the database with the indexes of 0.1.0, and their time is multiplied. Sweeps waited for the whole
   collection.
3. A collection with nothing to do, and one of 0.1.0, which lists the whole storage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from sqlalchemy import delete, inspect, select, text, update
from sqlalchemy.orm import Session

from service.db.queries import collection
from service.db.tables import Artifact, Job, Sample
from service.db.unit_of_work import UnitOfWork
from service.jobs.collector import Collector, remove_all_leftovers
from service.jobs.sources import TRAJECTORY_READERS
from service.maintenance import maintain
from service.service import Service
from service.settings import Settings
from service.states import FINAL_JOB_STATES
from service.storage import FileStore
from tests.servers import postgres_server
from tests.service import migrated_template

_FILES = 20_000
_SAMPLES_PER_FILE = 16
_OLD_TRANSACTIONS = 3
_OLD_ROWS = 20
_SWEEP_SECONDS = 1.0

_FILL = (
    "INSERT INTO models (id, name, base, figures, created_at) VALUES ('mdl_1', 'base', 'base', '{{}}', 0)",
    "INSERT INTO jobs (id, kind, state, spec, model_id, rounds, work_total, created_at, started_at, finished_at) "
    "VALUES ('job_1', 'sampling', 'succeeded', '{{}}', 'mdl_1', 0, 1, 0, 0, 1)",
    "INSERT INTO stages (id, job_id, number, kind, queue, round, shard, params, work, state, lease_epoch, "
    "progress_done, progress_total, attempt, crash_count, not_before, created_at, finished_at) "
    "SELECT 'stg_' || n, 'job_1', n, 'sample', 'gpu', 0, n, '{{}}', 1, 'succeeded', 1, 0, 0, 1, 0, 0, 0, 1 "
    "FROM generate_series(1, {files}) n",
    "INSERT INTO artifacts (id, job_id, stage_id, slot, key, sha256, size_bytes, media_type, created_at) "
    "SELECT 'art_' || lpad(n::text, 8, '0') || '_t', 'job_1', 'stg_' || n, 'trajectories', "
    "'jobs/job_1/stg_' || n || '/trajectories/0', '0', 1, "
    "'application/octet-stream', 0 FROM generate_series(1, {files}) n",
    "INSERT INTO artifacts (id, job_id, stage_id, slot, key, sha256, size_bytes, media_type, created_at) "
    "SELECT 'art_' || lpad((1 + (n - 1) / {per_file})::text, 8, '0') || '_i' || n, 'job_1', "
    "'stg_' || (1 + (n - 1) / {per_file}), 'image-' || n, 'jobs/image-' || n, '0', 1, "
    "'image/png', 0 FROM generate_series(1, {files} * {per_file}) n",
    "INSERT INTO samples (id, job_id, stage_id, round, role, split, prompt_index, prompt, number, seed, model_id, "
    "trajectory_artifact_id, trajectory_row, image_artifact_id, created_at) "
    "SELECT 'smp_' || n, 'job_1', 'stg_' || (1 + (n - 1) / {per_file}), 0, 'plain', 'train', 0, 'a circle', n, n, "
    "'mdl_1', 'art_' || lpad((1 + (n - 1) / {per_file})::text, 8, '0') || '_t', mod(n, {per_file}), "
    "'art_' || lpad((1 + (n - 1) / {per_file})::text, 8, '0') || '_i' || n, 0 "
    "FROM generate_series(1, {files} * {per_file}) n",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=_FILES, help="files of trajectories")
    measure(parser.parse_args().files)


def measure(files: int = _FILES) -> None:
    """Print the measurements, each with its alternative, on a temporary server."""
    with postgres_server() as server, tempfile.TemporaryDirectory() as name:
        # 1. the database twice, and the files
        filled = server.create_database(migrated_template(server))
        with _connected(filled) as uow:
            _fill(uow, files)
        old = server.create_database(filled.rsplit("/", 1)[1].partition("?")[0])
        store = FileStore(Path(name) / "artifacts")
        _write_files(Path(name) / "artifacts", files)
        of = f"{files:,} files at {files * _SAMPLES_PER_FILE:,} samples"
        settings = Settings(
            _env_file=None,
            data_dir=Path(name),
            database_url=filled,
            embedded_worker=False,
            sweep_seconds=_SWEEP_SECONDS,
            keep_trajectories="none",
        )

        # 2. collections of 0.1.0: with nothing to do, then of the files
        with _connected(old) as uow:
            _drop_new_indexes(uow)
            started = time.perf_counter()
            remove_all_leftovers(uow, store, settings)
            old_idle = time.perf_counter() - started
            _measure_as_in_0_1_0(uow, files, of)

        # 3. collections of now
        service = Service.open(settings)
        _measure_with_sweeps(service, files, of)
        _measure_idle(service, old_idle, files)
        service.close()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def _connected(url: str) -> Iterator[UnitOfWork]:
    uow = UnitOfWork.connect(url)
    yield uow
    uow.close()


def _fill(uow: UnitOfWork, files: int) -> None:
    with uow.engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # no foreign keys while it is filled
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        for statement in _FILL:
            connection.exec_driver_sql(statement.format(files=files, per_file=_SAMPLES_PER_FILE))
    with uow.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _write_files(folder: Path, files: int) -> None:
    for n in range(1, files + 1):
        path = folder / f"jobs/job_1/stg_{n}/trajectories/0"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"0")


def _drop_new_indexes(uow: UnitOfWork) -> None:
    """Drop the indexes of foreign keys that version 0.1.0 did not have."""
    with uow.engine.begin() as connection:
        for table in ("models", "samples", "pairs", "exports"):
            for index in inspect(connection).get_indexes(table):
                if index["name"] in _NEW_INDEXES:
                    connection.exec_driver_sql(f"DROP INDEX {index['name']}")


_NEW_INDEXES = frozenset(
    {
        "ix_models_adapter_artifact_id",
        "ix_models_optimizer_artifact_id",
        "ix_samples_stage_id",
        "ix_samples_model_id",
        "ix_samples_image_artifact_id",
        "ix_pairs_mask_artifact_id",
        "ix_exports_artifact_id",
    }
)


def _measure_with_sweeps(service: Service, files: int, of: str) -> None:
    stop = threading.Event()
    sweeps = [time.monotonic()]
    thread = threading.Thread(target=maintain, args=(service, stop, lambda: sweeps.append(time.monotonic())))
    started = time.monotonic()
    thread.start()
    while not _is_pruned(service.uow):
        time.sleep(0.5)
    seconds = time.monotonic() - started
    stop.set()
    thread.join()

    late = max(later - earlier for earlier, later in pairwise(sweeps)) - _SWEEP_SECONDS
    _say(
        f"collection of {of}: {seconds:.0f} s with its pauses; sweeps due every {_SWEEP_SECONDS:.0f} s meanwhile: "
        f"{len(sweeps) - 1}, the latest {max(0.0, late):.1f} s late"
    )
    left = sum(1 for _ in service.store.objects())
    if left:
        raise RuntimeError(f"{left} of {files} files are left")


def _is_pruned(uow: UnitOfWork) -> bool:
    with uow.reading() as session:
        return session.scalar(select(Job.trajectories_kept).where(Job.id == "job_1")) == "none"


def _measure_idle(service: Service, old_idle: float, files: int) -> None:
    collector = Collector(service.uow, service.store, service.settings)
    while not collector.run().complete:  # lists the stages once
        pass
    collector.run()
    started = time.perf_counter()
    collector.run()
    seconds = time.perf_counter() - started
    _say(f"collection with nothing to do: {1000 * seconds:.0f} ms")
    _say(f"leftovers of 0.1.0 with nothing to do, {files:,} objects listed: {1000 * old_idle:.0f} ms")


# The collection of version 0.1.0


def _measure_as_in_0_1_0(uow: UnitOfWork, files: int, of: str) -> None:
    started = time.perf_counter()
    for _ in range(_OLD_TRANSACTIONS):
        with uow.writing() as session:
            if len(_forget_as_in_0_1_0(session)) != _OLD_ROWS:
                raise RuntimeError("fewer files than expected")
    seconds = (time.perf_counter() - started) / _OLD_TRANSACTIONS
    total = seconds * files / _OLD_ROWS
    _say(
        f"collection of 0.1.0 of {of}: {total:.0f} s without a sweep, "
        f"computed from {_OLD_TRANSACTIONS} transactions of {_OLD_ROWS} files, {seconds:.2f} s each"
    )


def _forget_as_in_0_1_0(session: Session) -> list[str]:
    collection.unfinished_jobs(session, TRAJECTORY_READERS)
    trajectories = select(Sample.trajectory_artifact_id).where(Sample.trajectory_artifact_id.is_not(None))
    ended = select(Job.id).where(Job.state.in_(FINAL_JOB_STATES))
    query = select(Artifact.id, Artifact.key).where(Artifact.job_id.in_(ended), Artifact.id.in_(trajectories))
    keys = {row.id: row.key for row in session.execute(query.order_by(Artifact.id).limit(_OLD_ROWS))}

    samples = update(Sample).where(Sample.trajectory_artifact_id.in_(keys))
    session.execute(samples.values(trajectory_artifact_id=None, trajectory_row=None))
    session.execute(delete(Artifact).where(Artifact.id.in_(keys)))
    return list(keys.values())


if __name__ == "__main__":
    main()
