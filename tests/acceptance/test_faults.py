"""Fault injection into real processes: accepted jobs are done exactly once, with the results of an undisturbed run.

Each test prints its seed; DFUSION_FAULT_SEED repeats a run. DFUSION_FAULT_KILLS sets the number of kills
(`make test-faults`).
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from api.main import create_app
from service.db.tables import Artifact, Event, Model, Sample, Stage
from tests import invariants
from tests.deployment import DEPLOYED, EMBEDDED, PATIENCE_SECONDS, Deployment, until
from tests.installation import Installation
from tests.service import PROMPTS, round_body, settings_for

KILLS = int(os.environ.get("DFUSION_FAULT_KILLS", "3"))
SETTINGS = {
    "lease_seconds": 3,
    "heartbeat_seconds": 0.2,
    "sweep_seconds": 0.3,
    "checkpoint_seconds": 0.05,
    "max_crashes": 1000,
    "max_attempts": 1000,
    "retry_seconds": 0.05,
}
ROUND = round_body(
    samples_per_prompt=8,
    sampling={"num_steps": 16},
    fusion={"first_step": 1, "last_step": 15},
    training={"examples_per_update": 1, "micro_batch": 8, "inner_epochs": 1},
    evaluation=None,
)
PAIRS = 12
"""Three prompts; of eight samples a quarter are references, used twice."""
SMALL = round_body(prompts=PROMPTS[:1], sampling={"num_steps": 2}, fusion=None, evaluation=None)
KINDS = ("sample", "fuse", "train")
BUSY = ("sample", "score", "select", "fuse", "verify", "train")


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """A random generator with a printed seed."""
    seed = int(os.environ.get("DFUSION_FAULT_SEED") or time.time_ns() % 1_000_000)
    sys.stdout.write(f"{request.node.name}: DFUSION_FAULT_SEED={seed}\n")
    return random.Random(seed)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> str:
    """The SHA-256 of the adapter of ROUND, trained in this process without faults."""
    with TestClient(create_app(settings_for(tmp_path_factory.mktemp("undisturbed"), pipeline))) as client:
        alone = Installation(client)
        job = alone.done("/rounds", ROUND)
        assert (job["state"], job["made"]["pairs"]) == ("succeeded", PAIRS)
        return invariants.adapter_sha256(alone.service, job["id"])


@pytest.fixture(autouse=True)
def _in_order(installed: Deployment) -> Iterator[None]:
    """Check the invariants after each test."""
    yield
    for job_id in installed.accepted:
        assert installed.ended(job_id)["state"] == "succeeded"
    invariants.check(installed.service, installed.accepted, installed.logs(), installed.secrets)


def require_as_undisturbed(installed: Deployment, job_id: str, adapter: str) -> None:
    """The round has succeeded with all its pairs (I3) and the expected adapter (I5)."""
    job = installed.ended(job_id)
    assert (job["state"], job["error"]) == ("succeeded", None), installed.logs()[-20_000:]
    invariants.expect_pairs(installed.service, job_id, PAIRS)
    assert invariants.adapter_sha256(installed.service, job_id) == adapter


def test_workers_are_killed_again_and_again(installed: Deployment, dice: random.Random, undisturbed: str) -> None:
    """During sampling, fusion and training. In deployed mode, the parent of the worker process is killed as well."""
    job_id = installed.post("/rounds", ROUND)
    seen: set[tuple[str, int]] = set()
    kinds, killed = [*KINDS, *dice.choices(KINDS, k=max(0, KILLS - len(KINDS)))], 0
    for kind in sorted(kinds, key=KINDS.index):

        def fresh(kind: str = kind) -> Stage | None:
            running = installed.running(job_id, *KINDS[KINDS.index(kind) :])
            return running if running is not None and (running.id, running.lease_epoch) not in seen else None

        is_killed = False
        while not is_killed:  # retry if the process has just ended
            stage = until(fresh)
            time.sleep(dice.uniform(0, 0.5))
            is_killed = _kill(installed, stage, with_parent=dice.random() < 0.4)
        seen.add((stage.id, stage.lease_epoch))
        killed += 1
    require_as_undisturbed(installed, job_id, undisturbed)
    crashes = sum(event["data"].get("code") == "worker_lost" for event in installed.all(f"/jobs/{job_id}/events"))
    assert killed == len(kinds) and crashes > 0


def _kill(installed: Deployment, stage: Stage, with_parent: bool) -> bool:
    """Kill the process that runs or just ran the stage. Returns whether there was one."""
    worker = installed.worker_of(stage)
    if worker is None:
        return False
    owner = str(stage.lease_owner)
    if installed.mode == EMBEDDED or not with_parent:
        worker.kill()
        return True
    parent = installed.process[owner]
    parent.kill()
    parent.wait()
    worker.kill()
    installed.start_worker(owner)
    return True


def test_a_worker_that_slept_past_its_lease_writes_nothing(installed: Deployment, undisturbed: str) -> None:
    """Another worker finishes its stage in the meantime. Its parent sleeps as well, or would replace it."""
    if installed.mode == EMBEDDED:
        installed.run("second", "-m", "worker.local", "--alone", "--name", "second")
        until(lambda: "second is ready" in installed.log("second").read_text("utf-8"))
    job_id = installed.post("/rounds", ROUND)
    stage, asleep = _put_to_sleep(installed, job_id)
    try:
        until(lambda: _state(installed, stage.id) == "succeeded")
        before = _rows_of(installed, stage.id)
    finally:
        for process in asleep:
            process.resume()
    until(lambda: f"{stage.id} went to another worker" in installed.logs())
    assert _rows_of(installed, stage.id) == before
    require_as_undisturbed(installed, job_id, undisturbed)
    if installed.mode == EMBEDDED:
        installed.process["second"].terminate()
        assert installed.process["second"].wait(PATIENCE_SECONDS) == 0


def _put_to_sleep(installed: Deployment, job_id: str) -> tuple[Stage, list[psutil.Process]]:
    """Suspend a process that trains, and its parent unless that is the service.

    It must not be in a transaction, which would block all other processes.
    """
    while True:
        stage = until(lambda: installed.running(job_id, "train"))
        if installed.mode == EMBEDDED and stage.lease_owner != "second":
            worker = installed.worker_of(stage)
            if worker is not None:
                worker.terminate()  # returns the stage, for the second worker
            until(partial(_is_free_or_of_second, installed, stage.id))
            continue

        processes = [psutil.Process(installed.process[str(stage.lease_owner)].pid)]
        if installed.mode == DEPLOYED:
            worker = installed.worker_of(stage)
            if worker is None:
                continue
            processes.append(worker)
        for process in processes:
            process.suspend()
        try:
            with installed.service.uow.writing() as session:
                session.execute(select(Stage).where(Stage.id == stage.id).with_for_update())
                session.execute(text("UPDATE jobs SET label = label WHERE id = :id"), {"id": job_id})
            if _state(installed, stage.id) == "running":
                return stage, processes
        except SQLAlchemyError:
            pass
        for process in processes:
            process.resume()


def test_a_process_that_is_stopped_for_good_is_replaced(installed: Deployment, undisturbed: str) -> None:
    """It is never resumed: its parent kills it and starts another."""
    job_id = installed.post("/rounds", ROUND)
    worker = None
    while worker is None:  # retry if the process has just ended
        worker = installed.worker_of(until(lambda: installed.running(job_id, "train")))
    worker.suspend()
    require_as_undisturbed(installed, job_id, undisturbed)
    until(lambda: not worker.is_running())
    assert "has not responded for" in installed.logs()


def test_a_worker_that_hangs_in_a_step_is_replaced(installed: Deployment) -> None:
    """Its threads still renew the lease. The scorer hangs at its fourth batch, when a batch is known to be short."""
    job_id = installed.post("/rounds", SMALL | {"samples_per_prompt": 20, "reward": "hanging"})
    assert installed.ended(job_id)["state"] == "succeeded"
    lost = [stage.kind for stage in installed.stages(job_id) if stage.crash_count]
    assert lost == ["score"]
    assert "no progress for" in installed.logs()


def _is_free_or_of_second(installed: Deployment, stage_id: str) -> bool:
    with installed.service.uow.reading() as session:
        owner = session.scalars(select(Stage.lease_owner).where(Stage.id == stage_id)).one()
    return owner in (None, "second")


def _state(installed: Deployment, stage_id: str) -> str:
    with installed.service.uow.reading() as session:
        return str(session.scalars(select(Stage.state).where(Stage.id == stage_id)).one())


def _rows_of(installed: Deployment, stage_id: str) -> list[Any]:
    """Return the rows of the stage, its outputs and its events."""
    with installed.service.uow.reading() as session:
        outputs: list[Any] = [
            tuple(row)
            for table in (Artifact, Sample, Model, Event)
            for row in session.execute(
                select(*table.__table__.columns).where(table.stage_id == stage_id).order_by(table.id)
            )
        ]
        return [*outputs, tuple(session.execute(select(*Stage.__table__.columns).where(Stage.id == stage_id)).one())]


def test_a_stopping_worker_returns_its_training(installed: Deployment, undisturbed: str) -> None:
    job_id = installed.post("/rounds", ROUND)
    stage = until(lambda: (running := installed.running(job_id, "train")) and running.checkpoint_key and running)
    if installed.mode == EMBEDDED:
        worker = installed.worker_of(stage)
        assert worker is not None
        worker.terminate()
    else:
        parent = installed.process[stage.lease_owner]
        parent.terminate()
        assert parent.wait(PATIENCE_SECONDS) == 0
        installed.start_worker(stage.lease_owner)
    require_as_undisturbed(installed, job_id, undisturbed)
    kinds = [event["kind"] for event in installed.all(f"/jobs/{job_id}/events")]
    assert (kinds.count("stage.given_back"), kinds.count("training.resumed")) == (1, 1)
    training = next(candidate for candidate in installed.stages(job_id) if candidate.kind == "train")
    assert (training.attempt, training.crash_count) == (1, 0)


def test_a_service_killed_while_it_takes_a_request_makes_one_job(installed: Deployment, dice: random.Random) -> None:
    """The client repeats its request with the same Idempotency-Key until it gets a response."""
    job_ids = []
    for number in range(max(2, KILLS // 2)):
        accepted: list[str] = []
        with _submitting(installed, "/rounds", SMALL | {"seed": number}, f"kill-{dice.random()}", accepted):
            time.sleep(dice.uniform(0, 0.06))
            installed.process["api"].kill()
            installed.process["api"].wait()
            installed.start_api()
        job_ids += accepted
    assert len(set(job_ids)) == len(job_ids) == max(2, KILLS // 2)


@contextmanager
def _submitting(
    installed: Deployment, path: str, body: dict[str, Any], key: str, accepted: list[str]
) -> Iterator[None]:
    """Submit a job from a thread during the block. At the end, `accepted` contains the job's id."""

    def submit() -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with installed.client() as client:
            while time.monotonic() < deadline:
                try:
                    response = client.post(path, json=body, headers={"Idempotency-Key": key})
                except httpx.TransportError:
                    time.sleep(0.02)
                    continue
                if response.status_code == 202:
                    accepted.append(installed.accept(response))
                    return
                time.sleep(0.1)

    client = threading.Thread(target=submit)
    client.start()
    try:
        yield
    finally:
        client.join()
    assert accepted, "the client got no response"


def test_a_round_continues_without_its_broker(installed: Deployment, dice: random.Random, undisturbed: str) -> None:
    """Redis is flushed in the middle of the round, then killed and restarted."""
    if installed.servers is None:
        pytest.skip("embedded mode has no broker")
    redis = installed.servers.redis
    job_id = installed.post("/rounds", ROUND)
    for fault in (redis.flush, redis.kill):
        until(lambda: installed.running(job_id, *BUSY))
        time.sleep(dice.uniform(0, 0.5))
        fault()
    time.sleep(dice.uniform(0, 2))
    redis.start()
    require_as_undisturbed(installed, job_id, undisturbed)


def test_a_round_survives_a_database_outage(installed: Deployment, dice: random.Random, undisturbed: str) -> None:
    """PostgreSQL crashes in the middle of the round while clients submit jobs, and is later restarted gracefully."""
    if installed.servers is None:
        pytest.skip("embedded mode has no database server")
    postgres = installed.servers.postgres
    job_id = installed.post("/rounds", ROUND)
    for at_once in (True, False):
        accepted: list[str] = []
        until(lambda: installed.running(job_id, *KINDS))
        time.sleep(dice.uniform(0, 0.5))
        with _submitting(installed, "/samplings", _sampling(dice), f"outage-{dice.random()}", accepted):
            postgres.stop(signal.SIGQUIT if at_once else signal.SIGINT)
            time.sleep(dice.uniform(0, 2))
            postgres.start()
        assert installed.ended(accepted[0])["state"] == "succeeded"
    require_as_undisturbed(installed, job_id, undisturbed)


def _sampling(dice: random.Random) -> dict[str, Any]:
    return {"model": "tiny", "prompts": PROMPTS[:1], "samples_per_prompt": 1, "seed": dice.randrange(1000)}


def test_a_child_ends_with_its_killed_parent(installed: Deployment) -> None:
    """Otherwise it would share its GPU with the child of the replacement worker.

    The kernel kills the child (PR_SET_PDEATHSIG, set by Celery). It cannot return its stage; the sweeper requeues it.
    """
    if installed.mode != DEPLOYED:
        pytest.skip("the embedded worker has no Celery parent")
    body = {"model": "tiny", "prompts": PROMPTS[:1], "samples_per_prompt": 8, "sampling": {"num_steps": 200}}
    job_id = installed.post("/samplings", body)
    stage = until(lambda: installed.running(job_id, "sample"))
    child, parent = installed.worker_of(stage), installed.process[stage.lease_owner]
    assert child is not None
    parent.kill()
    parent.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    installed.start_worker(stage.lease_owner)
    assert installed.ended(job_id)["state"] == "succeeded"
    kinds = [event["kind"] for event in installed.all(f"/jobs/{job_id}/events")]
    assert (kinds.count("stage.given_back"), kinds.count("stage.retried")) == (0, 1)
