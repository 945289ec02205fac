"""How quick the service is, beside its aims: `python -m benchmarks.service [--jobs 40]`.

Deployed mode (PostgreSQL, Redis, S3, two Celery workers, all on this machine): POST /rounds by 20 clients while the
workers sample, each once a second: in turns, so that requests hardly meet, then at random times, so that some wait for
others; then each client as fast as it is answered. Both modes: the hand-over, which is how long a stage that could
start has waited when it starts, though its worker had nothing else to do. Then pages over a million samples
(`benchmarks.service_data`).
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
from itertools import accumulate, count
from pathlib import Path
from random import Random

import httpx
from fastapi.testclient import TestClient

from api.main import create_app
from benchmarks.service_data import SAMPLES_PER_JOB, fill, measure_pages
from service.db.tables import StageDependency
from service.settings import Settings
from tests.deployment import DEPLOYED, EMBEDDED, HASTE, Deployment, deployment, until
from tests.nets import tiny_pipeline
from tests.servers import postgres_server
from tests.service import PROMPTS, round_body

_CLIENTS = 20
_POST_MILLISECONDS = 50
_PAGE_MILLISECONDS = 30
_HAND_OVER_MILLISECONDS = 300
_PROMPTS = [{"text": f"a red and striped circle, number {n}", "items": ["circle"]} for n in range(40)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40, help=f"jobs of {SAMPLES_PER_JOB} samples that pages are over")
    parser.add_argument("--requests", type=int, default=20, help=f"requests of each of the {_CLIENTS} clients")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that its servers and workers end, too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_pipeline().save_pretrained(folder / "pipeline")
        for mode in (EMBEDDED, DEPLOYED):
            (folder / mode).mkdir()
            changes = {"max_queued_jobs": 100_000, "max_queued_jobs_per_key": 100_000, "shard_prompts": 1}
            changes |= {setting: Settings.model_fields[setting].default for setting in HASTE}
            with deployment(mode, folder / mode, folder / "pipeline", **changes) as made:
                _measure_hand_over(made)
                if mode == DEPLOYED:
                    _measure_posts(made, arguments.requests)
        if arguments.jobs:
            _measure_pages(folder, arguments.jobs)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _report(name: str, milliseconds: list[float], aim: str) -> None:
    found = statistics.quantiles(milliseconds, n=100)
    _say(f"{name}: median {found[49]:.0f} ms, 99% within {found[98]:.0f} ms, {len(milliseconds)} in all (aim: {aim})")


def _measure_hand_over(made: Deployment) -> None:
    body = round_body(prompts=_PROMPTS, samples_per_prompt=4, sampling={"num_steps": 2}, fusion=None, evaluation=None)
    while len({one["model"] for one in made.get("/workers")["data"]} - {None}) < 1:
        made.done("/rounds", body)  # loads the models
    made.done("/rounds", body)
    job_id = made.done("/rounds", body)["id"]
    _report(f"hand-over, {made.mode}", _hand_overs(made, job_id), f"< {_HAND_OVER_MILLISECONDS} ms")


def _hand_overs(made: Deployment, job_id: str) -> list[float]:
    """For each stage but a worker's first: its start, less the later ends of what it needs and of the worker's last."""
    found = {stage.id: stage for stage in made.stages(job_id)}
    with made.service.uow.reading() as session:
        needs: dict[str, list[float]] = {stage_id: [] for stage_id in found}
        for row in session.query(StageDependency).where(StageDependency.stage_id.in_(found)):
            needs[row.stage_id].append(found[row.needs_id].finished_at or 0)
    started = [event for event in made.all(f"/jobs/{job_id}/events") if event["kind"] == "stage.started"]
    free_at: dict[str, float] = {}
    waits = []
    for event in started:
        stage, owner = found[event["stage"]], event["data"]["worker"]
        if owner in free_at:
            waits.append(1000 * ((stage.started_at or 0) - max([free_at[owner], *needs[stage.id]])))
        free_at[owner] = stage.finished_at or 0
    return waits


def _measure_posts(made: Deployment, requests: int) -> None:
    long = {"model": "tiny", "prompts": _PROMPTS, "samples_per_prompt": 64, "sampling": {"num_steps": 200}}
    running = made.post("/samplings", long)
    until(lambda: made.running(running, "sample"))
    random = Random(0)
    turns = [[n / _CLIENTS + place for place in range(requests)] for n in range(_CLIENTS)]
    gaps = [list(accumulate(random.expovariate(1.0) for _ in range(requests))) for _ in range(_CLIENTS)]
    aim = f"99% < {_POST_MILLISECONDS} ms"
    _report(f"POST /rounds, {_CLIENTS} clients in turns, each once a second", _post(made, turns), aim)
    _report(f"POST /rounds, {_CLIENTS} clients at random, each once a second", _post(made, gaps), "none")
    _report(f"POST /rounds, {_CLIENTS} clients without a pause", _post(made, [[0.0] * requests] * _CLIENTS), "none")


def _post(made: Deployment, due: list[list[float]]) -> list[float]:
    """Milliseconds of each request. `due` has each client's times, in seconds from now; one that has not been answered
    by then sends its next request when it is.
    """
    seeds = count()
    all_are_here = threading.Barrier(len(due), timeout=60)

    def ask(times: list[float]) -> list[float]:
        with made.client() as client:
            client.get("/healthz")
            all_are_here.wait()
            begun = time.perf_counter()
            return [_post_one(client, begun + at, next(seeds)) for at in times]

    with ThreadPoolExecutor(len(due)) as clients:
        return [one for found in clients.map(ask, due) for one in found]


def _post_one(client: httpx.Client, at: float, seed: int) -> float:
    body = round_body(prompts=PROMPTS[:1], seed=seed)
    time.sleep(max(0.0, at - time.perf_counter()))
    started = time.perf_counter()
    answer = client.post("/rounds", json=body)
    milliseconds = 1000 * (time.perf_counter() - started)
    if answer.status_code != HTTPStatus.ACCEPTED:
        raise RuntimeError(answer.text)
    return milliseconds


def _measure_pages(folder: Path, jobs: int) -> None:
    with postgres_server() as server:
        url = server.create_database()
        settings = Settings(_env_file=None, data_dir=folder / "pages", database_url=url, embedded_worker=False)  # type: ignore[call-arg]
        app = create_app(settings)
        with TestClient(app) as client:
            fill(app.state.service.uow.engine, jobs, SAMPLES_PER_JOB)
            medians = measure_pages(app.state.service, client, jobs)
    aim = f"each < {_PAGE_MILLISECONDS} ms at the median"
    _say(f"pages over {jobs * SAMPLES_PER_JOB:,} samples: the slowest takes {max(medians):.0f} ms (aim: {aim})")


if __name__ == "__main__":
    main()
