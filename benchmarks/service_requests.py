"""Large requests and long lists against their earlier versions: `python -m benchmarks.service_requests [--short]`.

Requests go to a service in a separate process, on PostgreSQL and on SQLite, without workers. While a large request
runs, another client sends small ones; the slowest of these shows whether it was delayed. The earlier version of a
request is measured in this process on a part of the input, and scaled.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import select

from api.stack.program import free_port
from service.db.queries import results, stages
from service.db.tables import Stage
from service.jobs.kinds import RoundSpec
from service.jobs.kinds.rounds import measured_splits
from service.jobs.planning import plan_round
from service.plan import PlannedStage, Sizes
from service.service import Service, create_job
from service.states import StageKind
from tests.deployment import EMBEDDED, Deployment
from tests.nets import tiny_pipeline
from tests.servers import postgres_server
from tests.service import round_body, settings_for
from tests.stored_pairs import add_pairs

_JOBS = 50
_CALLS = 3
_PLANNED_ROUNDS = 10
_LOOKUPS = 500
_LISTS = 20
_PAUSE_SECONDS = 0.05
_REQUEST_SECONDS = 1.0
_LIST_MILLISECONDS = 50
_MANY = {"max_stages_per_job": 100_000_000, "max_images_per_job": 1_000_000_000, "max_queued_jobs": 100_000}


@dataclass(frozen=True)
class RequestSizes:
    """The sizes of the requests and of the list: prompts, rounds, ids of pairs, and stages of all jobs together."""

    prompts: int
    rounds: int
    pairs: int
    stages: int


FULL = RequestSizes(prompts=10_000, rounds=1_000, pairs=10_000, stages=50_000)
SHORT = RequestSizes(prompts=100, rounds=10, pairs=100, stages=500)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="small sizes")
    measure(SHORT if parser.parse_args().short else FULL)


def measure(sizes: RequestSizes = FULL) -> None:
    """Print the measurements on both databases."""
    with tempfile.TemporaryDirectory() as name, postgres_server() as server:
        folder = Path(name)
        tiny_pipeline().save_pretrained(folder / "pipeline")
        for database, url in (("PostgreSQL", server.create_database()), ("SQLite", "")):
            _measure_on(database, url, folder, sizes)


def _measure_on(database: str, url: str, folder: Path, sizes: RequestSizes) -> None:
    """Measure a service on this database; `folder` has the pipeline."""
    own = folder / database
    own.mkdir()
    changes = {"database_url": url, "port": free_port(), "embedded_worker": False, "shard_prompts": 4, **_MANY}
    deployed = Deployment(EMBEDDED, settings_for(own / "data", folder / "pipeline", **changes), own)
    try:
        deployed.start_api()
        _measure_rounds(deployed, database, sizes)
        _measure_trainings(deployed, database, sizes.pairs)
        _measure_lists(deployed, database, sizes.stages)
    finally:
        deployed.stop()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _measure_rounds(deployed: Deployment, database: str, requested: RequestSizes) -> None:
    # 1. the request
    prompts = [
        {"text": f"a red circle {n}", "items": ["circle"], "thresholds": [0.02]} for n in range(requested.prompts)
    ]
    body = round_body(prompts=prompts, rounds=requested.rounds)
    measured = _post(deployed, "/rounds", body)

    # 2. what it replaced: the plans of all rounds, for the sum of their work
    spec = RoundSpec.model_validate(body)
    measured_sets = measured_splits("set", None, {"set": requested.prompts})
    sizes = Sizes(deployed.settings.shard_prompts, requested.prompts, measured=measured_sets)
    planned = _seconds(lambda: [plan_round(spec, n, sizes) for n in range(_PLANNED_ROUNDS)])
    before = planned * requested.rounds / _PLANNED_ROUNDS

    name = f"{database}: POST /rounds with {requested.prompts:,} prompts x {requested.rounds:,} rounds"
    _report(name, measured, f"planning all rounds {before:.1f} s ({_PLANNED_ROUNDS} measured)")


def _measure_trainings(deployed: Deployment, database: str, pairs: int) -> None:
    # 1. the request
    ids = add_pairs(deployed.service, pairs)
    training = {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1}
    measured = _post(deployed, "/trainings", {"pairs": ids, "training": training})

    # 2. what it replaced: a lookup of each pair
    def look_up() -> None:
        with deployed.service.uow.reading() as session:
            for pair_id in ids[:_LOOKUPS]:
                results.get_pair(session, pair_id)
                session.expunge_all()

    looked_up = min(pairs, _LOOKUPS)
    before = _seconds(look_up) * pairs / looked_up
    name = f"{database}: POST /trainings with {pairs:,} pair ids"
    _report(name, measured, f"a lookup for each id {before:.1f} s ({looked_up} measured)")


def _report(name: str, measured: _Measured, before: str) -> None:
    median = statistics.median(measured.seconds)
    target = f"target: < {_REQUEST_SECONDS:.0f} s"
    _say(f"{name}: median {median:.2f} s, {measured.processor_seconds:.2f} s of processor time ({target})")
    _say(f"    before: {before}")
    _say(
        f"    slowest small request meanwhile {measured.slowest_small:.2f} s, without it {measured.slowest_alone:.2f} s"
    )


@dataclass(frozen=True)
class _Measured:
    """Large requests.

    Attributes:
        seconds: The time of each.
        processor_seconds: The mean processor time of the service for each.
        slowest_small: The time of the slowest small request meanwhile.
        slowest_alone: That of as many small requests without large ones.
    """

    seconds: list[float]
    processor_seconds: float
    slowest_small: float
    slowest_alone: float


def _post(deployed: Deployment, path: str, body: dict[str, Any]) -> _Measured:
    """Send a large request a few times: alone, and while another client sends small ones."""
    with deployed.client() as client:
        # 1. alone
        before = _processor_seconds(deployed)
        seconds = [_seconds(lambda: _require_accepted(client.post(path, json=body))) for _ in range(_CALLS)]
        processor = (_processor_seconds(deployed) - before) / _CALLS

        # 2. while another client sends small ones
        small: list[float] = []
        stop = threading.Event()
        other = threading.Thread(target=_send_small, args=(deployed, small, stop.is_set))
        other.start()
        try:
            for _ in range(_CALLS):
                _require_accepted(client.post(path, json=body))
        finally:
            stop.set()
            other.join()

    # 3. as many small ones alone
    alone: list[float] = []
    _send_small(deployed, alone, lambda: len(alone) >= len(small))
    return _Measured(seconds, processor, max(small), max(alone))


def _send_small(deployed: Deployment, seconds: list[float], is_done: Callable[[], bool]) -> None:
    with deployed.client() as client:
        client.get("/healthz")
        while not is_done():
            seconds.append(_seconds(lambda: _require_accepted(client.post("/rounds", json=round_body()))))
            time.sleep(_PAUSE_SECONDS)


def _processor_seconds(deployed: Deployment) -> float:
    """The processor time of the service so far; unlike other times, it means something on a busy machine."""
    times = psutil.Process(deployed.process["api"].pid).cpu_times()
    return float(times.user + times.system)


def _require_accepted(response: httpx.Response) -> None:
    if response.status_code != HTTPStatus.ACCEPTED:
        raise RuntimeError(response.text[:1000])


def _measure_lists(deployed: Deployment, database: str, number_of_stages: int) -> None:
    # 1. jobs with stages
    spec = RoundSpec.model_validate(round_body())
    jobs = [_add_job(deployed.service, spec, number_of_stages // _JOBS) for _ in range(_JOBS)]

    # 2. the list
    with deployed.client() as client:
        client.get("/jobs")
        used = _processor_seconds(deployed)
        milliseconds = [1000 * _seconds(lambda: client.get("/jobs").raise_for_status()) for _ in range(_LISTS)]
        processor = 1000 * (_processor_seconds(deployed) - used) / _LISTS

    # 3. what it replaced: all stages of the jobs
    def load() -> None:
        with deployed.service.uow.reading() as session:
            session.scalars(select(Stage).where(Stage.job_id.in_(jobs))).all()

    before = 1000 * _seconds(load)
    median = statistics.median(milliseconds)
    target = f"target: <= {_LIST_MILLISECONDS} ms"
    _say(
        f"{database}: GET /jobs over {number_of_stages:,} stages: median {median:.0f} ms, "
        f"{processor:.0f} ms of processor time"
    )
    _say(f"    {target}; before: {before:.0f} ms for the stages alone")


def _add_job(service: Service, spec: RoundSpec, number_of_stages: int) -> str:
    job_id = create_job(service, spec)
    with service.uow.writing() as session:
        plan = [PlannedStage(StageKind.FUSE, 2, 1, shard) for shard in range(number_of_stages)]
        stages.add(session, job_id, plan, after=stages.last_number(session, job_id))
    return job_id


if __name__ == "__main__":
    main()
