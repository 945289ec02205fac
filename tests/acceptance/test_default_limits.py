"""What happens at the default limits, where other tests use shorter ones."""

from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx import Response

from api.main import create_app
from service.db.queries import results, stages
from service.jobs import checking, execution
from service.jobs.execution import Claim, StageFailure
from service.service import Service
from service.settings import Settings
from service.storage import StoredObject
from tests.deployment import EMBEDDED, HASTE, Deployment, deployment, until
from tests.service import SCORERS, round_body, service_of
from tests.stored_pairs import Results

MANY = 10_000
MAX_CPU_SECONDS = 5.0
"""The large requests took half a minute. `make bench-service` measures them against the target of one second."""


@pytest.fixture
def client(tmp_path: Path, pipeline: Path) -> Iterator[TestClient]:
    """The application with default limits, without a worker."""
    settings = Settings(
        _env_file=None, data_dir=tmp_path, embedded_worker=False, models={"tiny": str(pipeline)}, scorers=SCORERS
    )  # type: ignore[call-arg]
    with TestClient(create_app(settings)) as opened:
        yield opened


@pytest.fixture
def service(client: TestClient) -> Service:
    return service_of(client)


def post(client: TestClient, path: str, body: dict[str, Any]) -> Response:
    """Send a large request, which must take little time."""
    started = process_time()
    response = client.post(path, json=body)
    assert process_time() - started < MAX_CPU_SECONDS
    return response


def start(client: TestClient) -> str:
    response = client.post("/rounds", json=round_body())
    assert response.status_code == 202
    return str(response.json()["id"])


def many_prompts(rounds: int) -> dict[str, Any]:
    texts = [f"a red circle {number}" for number in range(MANY)]
    prompts = [{"text": text, "items": ["circle"], "thresholds": [0.02]} for text in texts]
    return round_body(prompts=prompts, rounds=rounds)


def add_pairs(service: Service) -> list[str]:
    """Insert MANY verified pairs of the same three samples. Returns their ids."""
    rows = Results.of_new_job(service)
    file = rows.artifact("file")
    samples = [rows.sample(number, file, trajectory_artifact_id=file.id, trajectory_row=0) for number in range(3)]
    reference, base, target = (sample.id for sample in samples)
    outcome: dict[str, Any] = {"target_id": target, "adopted": True, "target_score": 0.2}
    pairs = [rows.pair(number, reference, base, **outcome) for number in range(MANY)]

    with service.uow.writing() as session:
        results.add_all(session, [file, *samples])
        results.add_all(session, pairs)
    return [pair.id for pair in pairs]


def claim(service: Service) -> Claim:
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None
    return held


def fail(service: Service, held: Claim) -> None:
    failure = StageFailure("storage", "the storage does not respond", retryable=True)
    execution.fail(service.uow, service.settings, held, failure)


def lose(service: Service, held: Claim) -> None:
    """Lose the worker: its lease, which would last for a minute, expires and is swept."""
    with service.uow.writing() as session:
        stages.get(session, held.stage_id).lease_expires_at = 0.0
    assert execution.sweep(service.uow, service.settings) == 1


def pass_time(service: Service, held: Claim) -> None:
    """The pause before the next attempt of the stage, of seconds to minutes, is over."""
    with service.uow.writing() as session:
        stages.get(session, held.stage_id).not_before = 0.0


def test_a_round_job_of_10000_prompts_and_1000_rounds_names_its_limit_at_once(client: TestClient) -> None:
    problem = post(client, "/rounds", many_prompts(1_000)).json()
    assert (problem["status"], problem["code"], problem["errors"][0]["pointer"]) == (422, "too_many_stages", "/rounds")
    assert "at most 1000000" in problem["detail"]


@pytest.mark.parametrize("path", ["/rounds", "/trainings"])
def test_a_large_job_is_created_at_once_and_holds_up_no_other_request(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """SQLite has one writer at a time: a request that was checked in its transaction would hold up all others."""
    body = many_prompts(100) if path == "/rounds" else {"pairs": add_pairs(service), "training": {"micro_batch": 4}}
    others: list[str] = []

    def check_beside_another_request(*arguments: Any) -> Any:
        monkeypatch.undo()
        checked = checking.check(*arguments)
        others.append(start(client))
        return checked

    monkeypatch.setattr("service.service.check", check_beside_another_request)
    response = post(client, path, body)
    assert response.status_code == 202
    newest_first = [job["id"] for job in client.get("/jobs").json()["data"]]
    assert newest_first[:2] == [response.json()["id"], *others]


@pytest.mark.parametrize("end", [fail, lose])
def test_a_pause_while_an_attempt_fails_ends_as_paused(
    client: TestClient, service: Service, end: Callable[[Service, Claim], None]
) -> None:
    job_id = start(client)
    held = claim(service)
    assert client.post(f"/jobs/{job_id}/pause").json()["state"] == "pausing"
    end(service, held)
    assert client.get(f"/jobs/{job_id}").json()["state"] == "paused"
    assert client.post(f"/jobs/{job_id}/resume").json()["state"] == "running"


def test_a_storage_failure_after_eight_lost_workers_is_tried_again(client: TestClient, service: Service) -> None:
    """Each of the eight workers was lost after a checkpoint. Eight is also the number of attempts."""
    job_id = start(client)
    held = claim(service)
    for number in range(service.settings.max_attempts):
        stored = StoredObject(f"checkpoint {number}", "0" * 64, 1)
        execution.checkpoint(service.uow, service.settings, held, stored)
        lose(service, held)
        pass_time(service, held)
        held = claim(service)
    fail(service, held)
    pass_time(service, held)
    assert claim(service).stage_id == held.stage_id
    assert client.get(f"/jobs/{job_id}").json()["state"] == "running"


def test_repeated_states_select_the_jobs_of_both(client: TestClient, service: Service) -> None:
    queued, running = start(client), start(client)
    cancelled = start(client)
    client.post(f"/jobs/{cancelled}/cancel")
    held = claim(service)
    queued, running = sorted((queued, running), key=lambda job_id: job_id == held.job_id)
    listed = client.get("/jobs?state=running&state=queued").json()["data"]
    assert {job["id"]: job["state"] for job in listed} == {queued: "queued", running: "running"}


def test_every_path_that_supports_get_supports_head(client: TestClient) -> None:
    """GET and HEAD of a path without parameters answer alike; those with parameters do not refuse the method."""
    paths = client.get("/openapi.json").json()["paths"]
    readable = [path for path, operations in paths.items() if "get" in operations]
    assert "/jobs" in readable and len(readable) > 20
    for path in readable:
        head = client.head(path)
        assert (head.status_code, head.content) == (client.get(path).status_code, b""), path


def default_limits() -> dict[str, Any]:
    """The defaults of all settings that other tests shorten."""
    return {name: Settings.model_fields[name].default for name in HASTE}


def check(installed: Deployment, name: str) -> dict[str, str]:
    """A readiness check of the service."""
    with installed.client() as client:
        checks: list[dict[str, str]] = client.get("/readyz").json()["checks"]
    return next(check for check in checks if check["name"] == name)


def succeeded(installed: Deployment, job_id: str) -> int:
    """The number of stages of the job that have succeeded."""
    return sum(stage.state == "succeeded" for stage in installed.stages(job_id))


def test_a_stopped_embedded_worker_is_reported_and_replaced(tmp_path: Path, pipeline: Path) -> None:
    with deployment(EMBEDDED, tmp_path, pipeline, **default_limits()) as installed:
        job_id = installed.post("/rounds", round_body(rounds=20, evaluation=None))
        until(lambda: installed.running(job_id, "sample"))
        worker = installed.embedded_worker()
        assert worker is not None
        worker.suspend()
        succeeded_before = succeeded(installed, job_id)
        until(lambda: "has not responded for" in check(installed, "worker")["detail"])
        assert check(installed, "worker")["state"] == "failed"

        until(lambda: not worker.is_running())
        until(lambda: check(installed, "worker")["state"] == "ok")
        until(lambda: succeeded(installed, job_id) > succeeded_before)
