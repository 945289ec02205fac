"""The service's latencies against their targets: `python -m benchmarks.service [--jobs 40]`.

POST /rounds is measured in deployed mode (PostgreSQL, Redis, S3, two Celery workers, all on this machine), with 20
clients while the workers sample. Each client sends one request per second: first in turns, so that requests rarely
overlap, then at random times, so that some wait for others. Finally each client sends without a pause. The hand-over is
measured in both modes: the time that a runnable stage waits although its worker is idle. Then claims and collections
are compared with those of version 0.1.0 (`benchmarks.claims`, `benchmarks.collection`). Then come pages over a million
samples (`benchmarks.service_data`), large requests (`benchmarks.service_requests`), and many clients at once for
minutes (`benchmarks.service_load`). With `--short` every part is small: it shows that they run, not how fast.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from itertools import accumulate, chain, count
from pathlib import Path
from random import Random
from typing import Any

import httpx
from fastapi.testclient import TestClient

from api.main import create_app
from benchmarks import claims, collection, service_load, service_requests
from benchmarks.service_data import SAMPLES_PER_JOB, fill, measure_pages
from service.db.tables import StageDependency
from service.settings import Settings
from tests.deployment import DEPLOYED, EMBEDDED, HASTE, Deployment, deployment, until
from tests.nets import tiny_pipeline
from tests.servers import postgres_server
from tests.service import PROMPTS, round_body

_CLIENTS = 20
_POST_MILLISECONDS = 50
_RANDOM_POST_MILLISECONDS = 80
_PAGE_MILLISECONDS = 30
_HAND_OVER_MILLISECONDS = 300
_PROMPTS = [{"text": f"a red and striped circle, number {n}", "items": ["circle"]} for n in range(40)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40, help=f"jobs of {SAMPLES_PER_JOB} samples to page over")
    parser.add_argument("--requests", type=int, default=20, help=f"requests of each of the {_CLIENTS} clients")
    parser.add_argument("--short", action="store_true", help="small sizes for all parts")
    arguments = parser.parse_args()
    short = arguments.short
    jobs = 1 if short else arguments.jobs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that its servers and workers end, too

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_pipeline().save_pretrained(folder / "pipeline")
        for mode in (EMBEDDED, DEPLOYED):
            (folder / mode).mkdir()
            changes: dict[str, Any] = {
                "max_queued_jobs": 100_000,
                "max_queued_jobs_per_key": 100_000,
                "shard_prompts": 1,
            }
            changes |= {setting: Settings.model_fields[setting].default for setting in HASTE}
            with deployment(mode, folder / mode, folder / "pipeline", **changes) as deployed:
                _measure_hand_over(deployed)
                if mode == DEPLOYED:
                    _measure_posts(deployed, 5 if short else arguments.requests)
        claims.measure(*((800,) if short else ()))
        collection.measure(*((200,) if short else ()))
        if jobs:
            _measure_pages(folder, jobs)
    service_requests.measure(service_requests.SHORT if short else service_requests.FULL)
    service_load.measure(*((20, 5, 20, 200) if short else ()))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _report(name: str, milliseconds: list[float], target: str) -> None:
    percentiles = statistics.quantiles(milliseconds, n=100)
    median = percentiles[49]
    last = percentiles[98]
    _say(f"{name}: median {median:.0f} ms, 99% within {last:.0f} ms, {len(milliseconds)} in all (target: {target})")


def _measure_hand_over(deployed: Deployment) -> None:
    body = round_body(prompts=_PROMPTS, samples_per_prompt=4, sampling={"num_steps": 2}, fusion=None, evaluation=None)
    while len({worker["model"] for worker in deployed.get("/workers")["data"]} - {None}) < 1:
        deployed.done("/rounds", body)  # loads the models
    deployed.done("/rounds", body)

    job_id = deployed.done("/rounds", body)["id"]
    _report(f"hand-over, {deployed.mode}", _hand_overs(deployed, job_id), f"< {_HAND_OVER_MILLISECONDS} ms")


def _hand_overs(deployed: Deployment, job_id: str) -> list[float]:
    """The milliseconds that each stage waited although its worker was idle, except each worker's first stage.

    A stage can start when its worker has finished the previous stage and all dependencies have finished.
    """
    # 1. when the dependencies of each stage finished
    stages = {stage.id: stage for stage in deployed.stages(job_id)}
    needs: dict[str, list[float]] = {stage_id: [] for stage_id in stages}
    with deployed.service.uow.reading() as session:
        for row in session.query(StageDependency).where(StageDependency.stage_id.in_(stages)):
            needs[row.stage_id].append(stages[row.needs_id].finished_at or 0)

    # 2. the waits, in order of start
    started = [event for event in deployed.all(f"/jobs/{job_id}/events") if event["kind"] == "stage.started"]
    free_at: dict[str, float] = {}
    waits = []
    for event in started:
        stage = stages[event["stage"]]
        owner = event["data"]["worker"]
        if owner in free_at:
            waits.append(1000 * ((stage.started_at or 0) - max([free_at[owner], *needs[stage.id]])))
        free_at[owner] = stage.finished_at or 0
    return waits


def _measure_posts(deployed: Deployment, requests: int) -> None:
    # 1. keep the workers busy
    long = {"model": "tiny", "prompts": _PROMPTS, "samples_per_prompt": 64, "sampling": {"num_steps": 200}}
    running = deployed.post("/samplings", long)
    until(lambda: deployed.running(running, "sample"))

    # 2. the clients' times
    random = Random(0)
    turns = []
    gaps = []
    for n in range(_CLIENTS):
        turns.append([n / _CLIENTS + second for second in range(requests)])
        gaps.append(list(accumulate(random.expovariate(1.0) for _ in range(requests))))

    # 3. the requests
    target = f"99% < {_POST_MILLISECONDS} ms"
    _report(f"POST /rounds, {_CLIENTS} clients in turns, each once a second", _post(deployed, turns), target)
    target_of_random = f"99% < {_RANDOM_POST_MILLISECONDS} ms"
    _report(f"POST /rounds, {_CLIENTS} clients at random, each once a second", _post(deployed, gaps), target_of_random)
    pauseless = [[0.0] * requests] * _CLIENTS
    _report(f"POST /rounds, {_CLIENTS} clients without a pause", _post(deployed, pauseless), "none")


def _post(deployed: Deployment, schedule: list[list[float]]) -> list[float]:
    """Milliseconds of each request.

    `schedule` has each client's times, in seconds from now. A client that still waits for a response at that time sends
    the next request as soon as it has the response.
    """
    seeds = count()
    ready = threading.Barrier(len(schedule), timeout=60)

    def send(times: list[float]) -> list[float]:
        with deployed.client() as client:
            client.get("/healthz")
            ready.wait()
            started = time.perf_counter()
            return [_post_single(client, started + at, next(seeds)) for at in times]

    with ThreadPoolExecutor(len(schedule)) as clients:
        return list(chain.from_iterable(clients.map(send, schedule)))


def _post_single(client: httpx.Client, at: float, seed: int) -> float:
    body = round_body(prompts=PROMPTS[:1], seed=seed)
    time.sleep(max(0.0, at - time.perf_counter()))

    started = time.perf_counter()
    response = client.post("/rounds", json=body)
    milliseconds = 1000 * (time.perf_counter() - started)
    if response.status_code != HTTPStatus.ACCEPTED:
        raise RuntimeError(response.text)
    return milliseconds


def _measure_pages(folder: Path, jobs: int) -> None:
    with postgres_server() as server:
        url = server.create_database()
        settings = Settings(_env_file=None, data_dir=folder / "pages", database_url=url, embedded_worker=False)
        app = create_app(settings)
        with TestClient(app) as client:
            fill(app.state.service.uow.engine, jobs, SAMPLES_PER_JOB)
            medians = measure_pages(app.state.service, client, jobs)

    target = f"each < {_PAGE_MILLISECONDS} ms at the median"
    _say(f"pages over {jobs * SAMPLES_PER_JOB:,} samples: the slowest takes {max(medians):.0f} ms (target: {target})")


if __name__ == "__main__":
    main()
