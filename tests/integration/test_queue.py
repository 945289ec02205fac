"""Hints through Redis to Celery workers, on SQLite. Workers do not poll: stages run only after a hint."""

import itertools
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from api.main import create_app
from service.broker import open_queue
from service.db.queries import stages
from service.db.tables import Stage
from service.maintenance import sweep_once
from service.service import Service
from service.settings import Settings
from tests.forking import Forked, fork
from tests.servers import RedisServer, redis_server
from tests.service import PROMPTS, round_body, service_of, settings_for, work_until_idle

PATIENCE_SECONDS = 240
ROOT = Path(__file__).parents[2]
_logger = logging.getLogger(__name__)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, pipeline: Path, redis: RedisServer) -> Settings:
    changes = {"broker_url": redis.url, "rehint_seconds": 0.2, "presence_seconds": 0.1, "checkpoint_seconds": 1e-6}
    return settings_for(tmp_path / "data", pipeline, **changes)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as opened:
        yield opened


@contextmanager
def celery_worker(settings: Settings, forks: bool = True) -> Iterator[subprocess.Popen[bytes] | Forked]:
    """Start a worker process. At the end of the block it is sent a stop signal and must end gracefully."""
    program = ["-m", "celery", "-A", "worker.celery_app", "worker", "-P", "prefork", "-c", "1"]
    program += ["-n", "one@test", "--without-mingle", "--loglevel", "INFO"]
    environment = settings.for_child() | {"PYTHONPATH": str(ROOT)}
    log = settings.data_dir / "worker.log"
    process: subprocess.Popen[bytes] | Forked
    if forks:
        process = fork(program, ROOT, environment, log)
    else:
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *program], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
    try:
        yield process
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def test_a_queue_holds_a_limited_number_of_hints(
    settings: Settings, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.broker.MAX_WAITING_HINTS", 250)
    queue = open_queue(settings)
    assert queue.waiting("gpu") == 0
    queue.hint([(f"stg_{number:026}", "gpu") for number in range(400)] + [("stg_other", "cpu")])
    until(lambda: queue.waiting("cpu") == 1)
    assert queue.waiting("gpu") == 250
    with Redis.from_url(redis.url) as client:
        assert client.memory_usage("gpu", samples=0) < 250 * 1500  # bytes, so 10,000 hints take 15 MB at most

    redis.flush()
    assert queue.waiting("gpu") == 0
    redis.kill()
    assert queue.waiting("gpu") is None
    queue.close()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def post(client: TestClient, **changes: Any) -> str:
    response = client.post("/rounds", json=round_body(**changes))
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def get(client: TestClient, path: str) -> Any:
    response = client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def stages_of(client: TestClient, job_id: str) -> list[dict[str, Any]]:
    return list(get(client, f"/jobs/{job_id}/stages?limit=200")["data"])


def ended(client: TestClient, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = until(
        lambda: (latest := get(client, f"/jobs/{job_id}?wait=10"))["state"] in ("succeeded", "failed") and latest
    )
    return job


def events(client: TestClient, job_id: str) -> list[dict[str, Any]]:
    return list(get(client, f"/jobs/{job_id}/events?limit=200")["data"])


@contextmanager
def sweeping(client: TestClient) -> Iterator[None]:
    """Sweep repeatedly during the block."""
    over = threading.Event()

    def sweep() -> None:
        while not over.wait(0.3):
            sweep_once(service_of(client))

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def has_torch(process: psutil.Process) -> bool:
    return any("libtorch" in region.path for region in process.memory_maps())


def test_a_round_runs_by_hints_alone(client: TestClient, settings: Settings) -> None:
    """Without a sweeper. The parent process stays small; the child keeps its model between stages."""
    with celery_worker(settings, forks=False) as process:
        parent = psutil.Process(process.pid)
        job = ended(client, post(client))
        assert (job["state"], job["error"], job["outputs"]["models"]) == ("succeeded", None, 1)
        (child,) = parent.children()
        assert (has_torch(parent), has_torch(child)) == (False, True)
        until(lambda: get(client, "/workers")["data"][0]["model"] == "tiny")
        (worker,) = get(client, "/workers")["data"]
        assert (worker["name"], worker["pid"], worker["device"]) == ("one@test", child.pid, "cpu")
        assert (worker["state"], sorted(worker["queues"])) == ("idle", ["cpu", "gpu"])
        assert {e["data"]["worker"] for e in events(client, job["id"]) if e["kind"] == "stage.started"} == {"one@test"}
        _log_hand_overs(stages_of(client, job["id"]))
        broken = ended(client, post(client, reward="lost-device", evaluation=None))
        assert (broken["state"], broken["error"]["code"]) == ("failed", "internal")
        until(lambda: [row["pid"] for row in get(client, "/workers")["data"]] not in ([child.pid], []))
    assert get(client, "/workers")["data"] == []


def _log_hand_overs(stages: list[dict[str, Any]]) -> None:
    """Log the time from one stage's end to the next one's start (target: below 300 ms)."""
    times = sorted((stage["started_at"], stage["finished_at"]) for stage in stages)
    seconds = [
        (datetime.fromisoformat(start) - datetime.fromisoformat(end)).total_seconds()
        for (_, end), (start, _) in itertools.pairwise(times)
    ]
    _logger.info("hand-over: median %.0f ms, longest %.0f ms", 1e3 * statistics.median(seconds), 1e3 * max(seconds))


def test_hints_that_are_lost_or_doubled_do_no_harm(client: TestClient, settings: Settings, redis: RedisServer) -> None:
    """The broker is down when the job is created, is flushed while the job runs, and gets every hint twice."""
    redis.kill()
    job_id = post(client)
    redis.start()
    queue = service_of(client).uow.queue
    with celery_worker(settings):
        assert {stage["state"] for stage in stages_of(client, job_id)} == {"queued"}
        with sweeping(client):
            until(lambda: "stage.succeeded" in [event["kind"] for event in events(client, job_id)])
            redis.flush()
            queue.hint([(stage["id"], "gpu") for stage in stages_of(client, job_id)] * 2)
            job = ended(client, job_id)
        redis.kill()
        redis.start()
        with sweeping(client):
            again = ended(client, post(client, evaluation=None))
        redis.kill()  # a worker can be stopped without Redis
    assert (job["state"], again["state"]) == ("succeeded", "succeeded")
    stages = stages_of(client, job_id)
    assert {(stage["attempts"], stage["crashes"]) for stage in stages} == {(1, 0)}
    started = [event["stage"] for event in events(client, job_id) if event["kind"] == "stage.started"]
    assert len(started) == len(set(started)) == len(stages)


def test_a_stopped_worker_returns_its_training_and_another_continues(client: TestClient, settings: Settings) -> None:
    training = {"examples_per_update": 1, "micro_batch": 1, "inner_epochs": 12}
    service = service_of(client)
    with celery_worker(settings) as parent:
        job_id = post(client, prompts=PROMPTS[:1], training=training, evaluation=None)
        until(lambda: training_of(service, job_id).checkpoint_key)
        os.kill(parent.pid, signal.SIGTERM)
        assert parent.wait(PATIENCE_SECONDS) == 0
    assert (training_of(service, job_id).state, training_of(service, job_id).lease_owner) == ("queued", None)
    work_until_idle(service)
    assert get(client, f"/jobs/{job_id}")["state"] == "succeeded"
    kinds = [event["kind"] for event in events(client, job_id)]
    assert (kinds.count("stage.given_back"), kinds.count("training.resumed")) == (1, 1)
    assert (training_of(service, job_id).attempt, training_of(service, job_id).crash_count) == (1, 0)


def training_of(service: Service, job_id: str) -> Stage:
    with service.uow.reading() as session:
        return next(stage for stage in stages.of_job(session, job_id) if stage.kind == "train")
