"""Limits on jobs, disk space and request rates."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.main import create_app
from service import keys
from service.db.unit_of_work import UnitOfWork
from service.keys import Caller
from tests.service import round_body, settings_for

ADMIN = "dfk_" + "a1" * 20
MORE_THAN_ANY_DISK_MB = 10**12


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Returns a function that starts the application with the given settings."""
    with ExitStack() as stack:

        def start_app(**changes: Any) -> TestClient:
            return stack.enter_context(
                TestClient(create_app(settings_for(tmp_path / "data", tmp_path / "tiny", **changes)))
            )

        yield start_app


def test_a_full_queue_rejects_jobs_until_one_ends(start: Callable[..., TestClient]) -> None:
    client = start(max_queued_jobs=2)
    first = client.post("/rounds", json=round_body(), headers={"Idempotency-Key": "one"})
    second = client.post("/rounds", json=round_body())
    refused = client.post("/rounds", json=round_body())
    assert [response.status_code for response in (first, second, refused)] == [202, 202, 429]
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("too_many_jobs", "30")
    assert refused.headers["content-type"] == "application/problem+json"
    assert len(client.get("/jobs").json()["data"]) == 2
    again = client.post("/rounds", json=round_body(), headers={"Idempotency-Key": "one"})
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert client.post("/rounds?dry_run=true", json=round_body()).status_code == 200
    assert client.post("/rounds", json=round_body(seed=-1)).status_code == 422
    client.post(f"/jobs/{second.json()['id']}/cancel")
    assert client.post("/rounds", json=round_body()).status_code == 202


def test_one_key_cannot_fill_the_queue(start: Callable[..., TestClient]) -> None:
    client = start(auth=True, bootstrap_admin_key=SecretStr(ADMIN), max_queued_jobs=3, max_queued_jobs_per_key=2)
    admin = {"Authorization": f"Bearer {ADMIN}"}
    key = client.post("/api-keys", json={"name": "ann", "scopes": ["submit"]}, headers=admin).json()
    ann = {"Authorization": f"Bearer {key['key']}"}
    responses = [client.post("/rounds", json=round_body(), headers=caller) for caller in (ann, ann, ann, admin, admin)]
    assert [response.status_code for response in responses] == [202, 202, 429, 202, 429]
    assert "per API key" in responses[2].json()["detail"]
    assert "per API key" not in responses[4].json()["detail"]


def test_jobs_are_rejected_when_the_disk_is_nearly_full(start: Callable[..., TestClient]) -> None:
    client = start(min_free_disk_mb=MORE_THAN_ANY_DISK_MB)
    refused = client.post("/rounds", json=round_body())
    assert (refused.status_code, refused.json()["code"]) == (503, "low_disk")
    assert refused.headers["retry-after"] == "60"
    assert client.get("/jobs").json()["data"] == []


def test_rate_limit_responds_with_retry_after(start: Callable[..., TestClient]) -> None:
    client = start(requests_per_second=0.001)
    responses = [client.get("/jobs") for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 429, 429]
    assert responses[1].json()["code"] == "too_many_requests"
    assert 900 < int(responses[1].headers["retry-after"]) <= 1000
    assert client.get("/healthz").status_code == 200


def test_rate_limit_applies_per_key_and_for_invalid_keys_per_address(start: Callable[..., TestClient]) -> None:
    client = start(auth=True, bootstrap_admin_key=SecretStr(ADMIN), requests_per_second=1e-6)
    admin = {"Authorization": f"Bearer {ADMIN}"}
    assert [client.get("/jobs", headers=admin).status_code for _ in range(2)] == [200, 429]
    guesses = [client.get("/jobs", headers={"Authorization": f"Bearer dfk_{n:040}"}) for n in range(2)]
    assert [response.status_code for response in guesses] == [401, 429]


def test_invalid_keys_beyond_the_rate_are_not_looked_up(
    start: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was valid before is not affected, although it comes from the same address."""
    client = start(auth=True, bootstrap_admin_key=SecretStr(ADMIN), requests_per_second=1e-3)
    looked_up = []
    authenticate = keys.authenticate

    def record(uow: UnitOfWork, token: str) -> Caller | None:
        looked_up.append(token)
        return authenticate(uow, token)

    monkeypatch.setattr(keys, "authenticate", record)
    admin = {"Authorization": f"Bearer {ADMIN}"}
    assert client.get("/jobs", headers=admin).status_code == 200
    guesses = [f"dfk_{n:040}" for n in range(20)]
    statuses = [client.get("/jobs", headers={"Authorization": f"Bearer {key}"}).status_code for key in guesses]
    assert statuses == [401] + [429] * 19
    client.get("/jobs", headers=admin)
    assert looked_up == [ADMIN, *guesses[:2], ADMIN]
