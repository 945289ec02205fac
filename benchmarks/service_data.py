"""Latency of lists and claims with a million samples: `python -m benchmarks.service_data [--url URL] [--explain]`.

It fills an empty PostgreSQL database (on a temporary server unless `--url` names one) with jobs of 25,000 samples and
6,250 pairs each. It requests pages from the start and the middle of each list. Then it adds 10,000 stages that wait for
others, and claims stages. It prints the median and the 99th percentile of each, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import Connection, Engine, event

from api.main import create_app
from dfusion.prompts import Prompt
from service.db.queries import stages
from service.db.queries.pages import encode_cursor
from service.jobs import execution
from service.jobs.kinds import RoundSpec
from service.plan import PlannedStage
from service.service import Service, create_job
from service.settings import Settings
from service.states import StageKind
from tests.servers import postgres_server

_JOBS = 40
SAMPLES_PER_JOB = 25_000
_ROUNDS = 10
_WAITING_STAGES = 10_000
_CALLS = 100

_FILL = (
    "SET session_replication_role = replica",  # no foreign keys while it is filled
    "INSERT INTO prompt_sets SELECT 'set_' || lpad(n::text, 26, '0'), 'set-' || n, 1, '', false, '[]', '', 0 "
    "FROM generate_series(1, 4) n",
    "INSERT INTO models (id, name, base, figures, created_at) "
    "VALUES ('mdl_' || lpad('1', 26, '0'), 'filled', 'filled', '{{}}', 0)",
    "INSERT INTO jobs (id, kind, state, spec, prompt_set_id, model_id, rounds, work_total, samples_made, pairs_made, "
    "models_made, created_at, started_at) "
    "SELECT 'job_' || lpad(n::text, 26, '0'), 'round', 'running', "
    "'{{\"prompt_set\": \"set-1\"}}', 'set_' || lpad((1 + n % 4)::text, 26, '0'), 'mdl_' || lpad('1', 26, '0'), "
    "{rounds}, 1, {samples}, {pairs}, 0, n, n FROM generate_series(1, {jobs}) n",
    "INSERT INTO stages (id, job_id, number, kind, queue, round, shard, params, work, state, lease_epoch, "
    "progress_done, progress_total, attempt, crash_count, not_before, created_at) "
    "SELECT 'stg_' || lpad(n::text, 26, '0'), 'job_' || lpad(n::text, 26, '0'), 1, 'sample', 'gpu', 1, 0, '{{}}', 1, "
    "'succeeded', 1, 0, 0, 1, 0, 0, 0 FROM generate_series(1, {jobs}) n",
    "INSERT INTO artifacts SELECT 'art_' || lpad(n::text, 26, '0'), 'job_' || lpad(j::text, 26, '0'), "
    "'stg_' || lpad(j::text, 26, '0'), 'image-' || n, 'jobs/' || n, md5(n::text), 100000, 'image/png', n "
    "FROM generate_series(1, {jobs}) j, LATERAL generate_series((j - 1) * {samples} + 1, j * {samples}) n",
    "INSERT INTO samples (id, job_id, stage_id, round, role, split, prompt_set_id, prompt_index, prompt, number, seed, "
    "model_id, image_artifact_id, created_at) "
    "SELECT 'smp_' || lpad(n::text, 26, '0'), 'job_' || lpad(j::text, 26, '0'), 'stg_' || lpad(j::text, 26, '0'), "
    "1 + (n - 1) % {samples} * {rounds} / {samples}, (ARRAY['plain', 'base', 'reference', 'target', 'plain', "
    "'evaluation', 'plain', 'plain'])[1 + n % 8], 'train', 'set_' || lpad((1 + j % 4)::text, 26, '0'), n % 40, "
    "'the red circle above the blue square, number ' || n % 40, n % 16, n, 'mdl_' || lpad('1', 26, '0'), "
    "'art_' || lpad(n::text, 26, '0'), n "
    "FROM generate_series(1, {jobs}) j, LATERAL generate_series((j - 1) * {samples} + 1, j * {samples}) n",
    "INSERT INTO scores SELECT 'smp_' || lpad(n::text, 26, '0'), 'reward', '1', random() "
    "FROM generate_series(1, {jobs} * {samples}) n",
    "INSERT INTO scores SELECT 'smp_' || lpad((5 * n)::text, 26, '0'), 'second', '1', random() "
    "FROM generate_series(1, {jobs} * {samples} / 5) n",
    "INSERT INTO pairs (id, job_id, stage_id, round, number, prompt_set_id, prompt_index, prompt, reference_id, "
    "base_id, target_id, adopted, scorer, scorer_version, reference_score, base_score, target_score, figures, "
    "revision, created_at) "
    "SELECT 'pair_' || lpad(n::text, 26, '0'), 'job_' || lpad(j::text, 26, '0'), 'stg_' || lpad(j::text, 26, '0'), "
    "1 + (n - 1) % {pairs} * {rounds} / {pairs}, n, 'set_' || lpad((1 + j % 4)::text, 26, '0'), n % 40, "
    "'the red circle above the blue square', 'smp_' || lpad((4 * n - 1)::text, 26, '0'), "
    "'smp_' || lpad((4 * n - 2)::text, 26, '0'), 'smp_' || lpad((4 * n)::text, 26, '0'), n % 3 > 0, 'reward', '1', "
    "1, 0, 0.5, '{{\"mask_cover\": 0.25}}', 0, n "
    "FROM generate_series(1, {jobs}) j, LATERAL generate_series((j - 1) * {pairs} + 1, j * {pairs}) n",
)


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="an empty PostgreSQL database to fill; a temporary server if not given")
    parser.add_argument("--sqlite", action="store_true", help="claims only, on SQLite")
    parser.add_argument("--jobs", type=int, default=_JOBS, help=f"jobs of {SAMPLES_PER_JOB} samples")
    parser.add_argument("--explain", action="store_true", help="also print the plans of the pages' first queries")
    arguments = parser.parse_args()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = arguments.url or ""
        if not url and not arguments.sqlite:
            url = stack.enter_context(postgres_server()).create_database()
        settings = Settings(_env_file=None, data_dir=folder, database_url=url, embedded_worker=False)
        app = create_app(settings)
        client = stack.enter_context(TestClient(app))
        service: Service = app.state.service

        if not arguments.sqlite:
            started = time.monotonic()
            fill(service.uow.engine, arguments.jobs, SAMPLES_PER_JOB)
            _say(f"filled in {time.monotonic() - started:.0f} s")
            measure_pages(service, client, arguments.jobs, arguments.explain)
        _measure_claims(service)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def fill(engine: Engine, jobs: int, samples_per_job: int) -> None:
    """Fill an empty PostgreSQL database: a pair per four samples, a score per sample, a second one for every fifth."""
    sizes = {"jobs": jobs, "samples": samples_per_job, "pairs": samples_per_job // 4, "rounds": _ROUNDS}
    with engine.connect() as connection:
        connection.detach()  # so that its settings are not reused
        connection.exec_driver_sql("SET statement_timeout = 0")
        for statement in _FILL:
            connection.exec_driver_sql(statement.format(**sizes).replace("%", "%%"))
        connection.commit()

    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.detach()
        connection.exec_driver_sql("SET statement_timeout = 0")
        connection.exec_driver_sql("VACUUM ANALYZE")


def measure_pages(service: Service, client: TestClient, jobs: int, explain: bool = False) -> list[float]:
    """Measure pages of a filled database. Returns the median of each in milliseconds."""
    # 1. the filters and cursors
    middle = jobs // 2 or 1
    job = f"job_{middle:026d}"
    by_job = f"job={job}"
    by_set = f"prompt_set=set_{1 + middle % 4:026d}"
    sample = encode_cursor(f"smp_{(middle - 1) * SAMPLES_PER_JOB + 500:026d}")
    pair = encode_cursor(f"pair_{(middle - 1) * SAMPLES_PER_JOB // 4 + 100:026d}")
    sample_filters = ["", by_job]
    sample_filters += [f"{by_job}&{more}" for more in ("role=target", "round=7", "round=7&role=base")]
    sample_filters += ["role=target", "round=7", "round=999", by_set, f"{by_set}&role=target"]
    sample_filters += ["prompt=the+red+circle+above+the+blue+square,+number+7", "scorer=second&score_min=0.99999"]
    filters = {
        "/samples": sample_filters,
        "/pairs": ["", by_job, f"{by_job}&round=7", f"{by_job}&adopted=false", "adopted=true", "round=7", by_set],
    }

    # 2. the lists
    medians = []
    for path, queries in filters.items():
        for query in queries:
            for cursor in ("", f"cursor={sample if path == '/samples' else pair}"):
                parameters = "&".join(part for part in (query, cursor) if part)
                name = f"{path}?{query}{' (middle)' if cursor else ''}"
                medians.append(_measure(name, lambda a=f"{path}?{parameters}": _get(client, a)))  # type: ignore[misc]
                if explain:
                    _explain(service, client, f"{path}?{parameters}")

    # 3. single resources
    for path in (f"/jobs/{job}", "/jobs", f"/samples/smp_{4:026d}"):
        medians.append(_measure(path, lambda a=path: _get(client, a)))  # type: ignore[misc]
    return medians


def _get(client: TestClient, path: str) -> None:
    response = client.get(path)
    if response.status_code != 200:
        raise RuntimeError(f"{path}: {response.text}")


def _measure(name: str, call: Callable[[], object], calls: int = _CALLS) -> float:
    """Print the median and the 99th percentile. Returns the median in milliseconds."""
    call()

    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)

    percentiles = statistics.quantiles(seconds, n=100)
    _say(f"{1000 * percentiles[49]:8.1f} {1000 * percentiles[98]:8.1f}  {name}")
    return 1000 * percentiles[49]


def _explain(service: Service, client: TestClient, path: str) -> None:
    """Print the plan of the page's query."""
    with _statements(service) as statements:
        _get(client, path)
    statement, parameters = next((s, p) for s, p in statements if "FROM samples" in s or "FROM pairs" in s)
    with service.uow.engine.connect() as connection:
        for row in connection.exec_driver_sql(f"EXPLAIN (ANALYZE, COSTS OFF) {statement}", parameters):  # type: ignore[arg-type]
            _say(f"    {row[0]}")


@contextmanager
def _statements(service: Service) -> Iterator[list[tuple[str, object]]]:
    """The SQL statements that are executed within the context."""
    statements: list[tuple[str, object]] = []

    def record(_connection: Connection, _cursor: object, statement: str, parameters: object, *_rest: object) -> None:
        statements.append((statement, parameters))

    event.listen(service.uow.engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(service.uow.engine, "before_cursor_execute", record)


def _measure_claims(service: Service) -> None:
    spec = RoundSpec(prompts=(Prompt(text="a cat", items=("cat",), thresholds=(0.5,)),))
    job_id = create_job(service, spec)
    _add_stages(service, job_id, 1, _WAITING_STAGES)
    while execution.claim(service.uow, service.settings, "w") is not None:
        pass
    waiting = f"{_WAITING_STAGES} stages wait"
    _measure(f"claim: nothing is free, {waiting}", lambda: execution.claim(service.uow, service.settings, "w"))
    _add_stages(service, job_id, 2 * _CALLS, 0)
    _measure(f"claim: a stage, {waiting}", lambda: execution.claim(service.uow, service.settings, "w"))


def _add_stages(service: Service, job_id: str, free: int, waiting: int) -> None:
    """Add stages that can be claimed, and stages that wait for the first of these."""
    plan = [PlannedStage(StageKind.FUSE, 1 + free, 1, shard) for shard in range(free)]
    plan += [PlannedStage(StageKind.VERIFY, 1 + free, 1, shard, needs=(0,)) for shard in range(waiting)]
    with service.uow.writing() as session:
        stages.add(session, job_id, plan)


if __name__ == "__main__":
    main()
