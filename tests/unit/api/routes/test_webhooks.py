"""Webhooks: messages are signed, written with the change that they report, repeated, and replayed."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from fastapi.testclient import TestClient
from sqlalchemy import update

from api.main import create_app
from api.stack.program import free_port, is_listening
from service import outgoing, webhooks
from service.db.clock import now_seconds
from service.db.queries import jobs
from service.db.queries import webhooks as rows
from service.db.tables import Webhook, WebhookDelivery
from service.jobs.collector import collect
from service.maintenance import maintain
from service.webhooks import deliver_due
from tests.deployment import until
from tests.pages import blocks, replaced
from tests.receivers import Receiver, receiving
from tests.service import round_body, service_of, settings_for


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(settings_for(tmp_path / "data", tmp_path / "tiny", webhooks_allow_loopback=True))
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def create(client: TestClient, url: str, **more: Any) -> dict[str, Any]:
    response = client.post("/webhooks", json={"url": url, **more})
    assert response.status_code == 201, response.text
    return dict(response.json())


def cancelled_job(client: TestClient) -> str:
    """Create a job and cancel it. Returns its id."""
    job = client.post("/rounds", json=round_body(label="for ann")).json()
    client.post(f"/jobs/{job['id']}/cancel")
    return str(job["id"])


def deliveries(client: TestClient) -> list[dict[str, Any]]:
    return list(client.get("/webhook-deliveries").json()["data"])


def make_due(client: TestClient) -> None:
    with service_of(client).uow.writing() as session:
        session.execute(update(WebhookDelivery).values(next_attempt_at=now_seconds()))


def test_a_signed_message_says_that_a_job_has_ended(client: TestClient, receiver: Receiver) -> None:
    hook = create(client, receiver.url)
    job = cancelled_job(client)
    assert deliver_due(service_of(client)) == 1
    [(headers, body)] = receiver.requests
    message = standardwebhooks.Webhook(hook["secret"]).verify(body, headers)
    assert message["type"] == "job.cancelled"
    data = {"job": job, "kind": "round", "state": "cancelled", "label": "for ann", "error": None, "stopped": None}
    assert message["data"] == data
    assert headers["content-type"] == "application/json"
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(hook["secret"]).verify(body.replace(b"cancelled", b"succeeded"), headers)

    [delivery] = deliveries(client)
    assert headers["webhook-id"] == delivery["id"]
    assert (delivery["state"], delivery["attempts"], delivery["last_status"]) == ("delivered", 1, 204)
    assert deliver_due(service_of(client)) == 0


def test_the_secret_is_shown_once_and_never_logged(
    client: TestClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        secret = create(client, f"{receiver.url}?token=swordfish")["secret"]
        assert secret.startswith("whsec_") and len(secret) > 40
        receiver.status = 500
        cancelled_job(client)
        deliver_due(service_of(client))
    assert secret not in client.get("/webhooks").text + client.get("/webhook-deliveries").text
    assert secret.removeprefix("whsec_") not in caplog.text and "swordfish" not in caplog.text
    assert "dlv_" in caplog.text


def test_only_wanted_events_are_sent(client: TestClient, receiver: Receiver) -> None:
    create(client, receiver.url, events=["job.succeeded", "job.waiting"])
    job = cancelled_job(client)
    assert deliveries(client) == []
    with service_of(client).uow.writing() as session:
        jobs.add_event(session, job, "job.waiting", "the job waits for verdicts on its pairs")
    assert [delivery["event"] for delivery in deliveries(client)] == ["job.waiting"]


def test_a_change_that_is_rolled_back_is_not_reported(client: TestClient, receiver: Receiver) -> None:
    create(client, receiver.url)
    job = client.post("/rounds", json=round_body()).json()["id"]
    with pytest.raises(RuntimeError), service_of(client).uow.writing() as session:
        jobs.add_event(session, job, "job.failed", "it failed")
        raise RuntimeError
    assert deliveries(client) == []


@pytest.mark.parametrize("status", [302, 400, 503])
def test_a_failed_attempt_is_repeated_after_a_growing_pause(
    client: TestClient, receiver: Receiver, status: int
) -> None:
    create(client, receiver.url)
    cancelled_job(client)
    receiver.status = status
    pauses = []
    for _ in range(2):
        make_due(client)
        begun = time.time()
        assert deliver_due(service_of(client)) == 1
        [delivery] = deliveries(client)
        assert (delivery["state"], delivery["last_status"], delivery["last_error"]) == (
            "pending",
            status,
            f"status {status}",
        )
        assert deliver_due(service_of(client)) == 0
        with service_of(client).uow.reading() as session:
            pauses.append(rows.get_delivery(session, delivery["id"]).next_attempt_at - begun)
    assert 3.5 < pauses[0] < 8 and 47 < pauses[1] < 75  # 5 s and 60 s, within a fifth
    receiver.status = 200
    make_due(client)
    deliver_due(service_of(client))
    assert deliveries(client)[0]["state"] == "delivered"
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1


def test_attempts_end_at_a_limit_and_begin_again_with_a_replay(client: TestClient, receiver: Receiver) -> None:
    create(client, receiver.url)
    cancelled_job(client)
    receiver.status = 500
    for _ in range(11):
        make_due(client)
        deliver_due(service_of(client))
    make_due(client)
    assert deliver_due(service_of(client)) == 0
    [delivery] = deliveries(client)
    assert (delivery["state"], delivery["attempts"], len(receiver.requests)) == ("failed", 11, 11)
    assert delivery["next_attempt_at"] is None

    receiver.status = 200
    replayed = client.post(f"/webhook-deliveries/{delivery['id']}/replay")
    assert (replayed.status_code, replayed.json()["state"], replayed.json()["attempts"]) == (202, "pending", 0)
    deliver_due(service_of(client))
    assert deliveries(client)[0]["state"] == "delivered"
    assert receiver.requests[0][0]["webhook-id"] == receiver.requests[-1][0]["webhook-id"]


def test_a_delivery_whose_sender_died_is_sent_again(client: TestClient, receiver: Receiver) -> None:
    hook = create(client, receiver.url)
    cancelled_job(client)
    with service_of(client).uow.writing() as session:
        [claimed] = rows.claim_due(session, hook["id"], 5, 60.0)  # and no outcome is recorded
    assert deliver_due(service_of(client)) == 0
    make_due(client)
    assert deliver_due(service_of(client)) == 1
    with service_of(client).uow.writing() as session:  # the first sender was only slow: its outcome comes too late
        rows.record_failed(session, claimed, 500, "status 500")
    assert (deliveries(client)[0]["state"], deliveries(client)[0]["attempts"]) == ("delivered", 2)


def test_gone_disables_a_webhook(client: TestClient, receiver: Receiver) -> None:
    hook = create(client, receiver.url)
    cancelled_job(client)
    receiver.status = 410
    deliver_due(service_of(client))
    [shown] = client.get("/webhooks").json()["data"]
    assert shown["id"] == hook["id"] and "410" in shown["disabled_reason"]
    [delivery] = deliveries(client)
    assert (delivery["state"], delivery["last_status"]) == ("failed", 410)
    cancelled_job(client)
    assert len(deliveries(client)) == 1
    assert client.post(f"/webhook-deliveries/{delivery['id']}/replay").status_code == 409


def test_a_removed_webhook_gets_nothing_more(client: TestClient, receiver: Receiver) -> None:
    hook = create(client, receiver.url)
    cancelled_job(client)
    for _ in range(2):
        assert client.delete(f"/webhooks/{hook['id']}").status_code == 204
    make_due(client)
    assert (deliver_due(service_of(client)), receiver.requests) == (0, [])
    with service_of(client).uow.reading() as session:
        assert rows.get(session, hook["id"]).secret == ""
    assert client.delete("/webhooks/whk_00000000000000000000000000").status_code == 404


@pytest.mark.parametrize("url", ["http://example.org/", "https://10.0.0.1/", "https://[fd00::1]/", "nonsense"])
def test_a_url_that_is_not_public_is_422(client: TestClient, url: str) -> None:
    response = client.post("/webhooks", json={"url": url})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/url")


def test_loopback_is_refused_by_default(tmp_path: Path) -> None:
    with TestClient(create_app(settings_for(tmp_path / "data", tmp_path / "tiny"))) as client:
        for url in ("http://127.0.0.1:8000/", "https://127.0.0.1/", "http://localhost/"):
            assert client.post("/webhooks", json={"url": url}).status_code == 422


def test_the_number_of_webhooks_has_a_limit(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "MAX_WEBHOOKS", 2)
    hooks = [create(client, f"https://example.org/{number}") for number in range(2)]
    assert client.post("/webhooks", json={"url": "https://example.org/"}).status_code == 409
    client.delete(f"/webhooks/{hooks[0]['id']}")
    create(client, "https://example.org/")


def test_old_deliveries_and_webhooks_disabled_long_ago_are_forgotten(client: TestClient, receiver: Receiver) -> None:
    """Also if no webhook is left that is not disabled."""
    service = service_of(client)
    hook = create(client, receiver.url)
    cancelled_job(client)
    deliver_due(service)
    client.delete(f"/webhooks/{hook['id']}")
    month = 30 * 86_400
    for age, left in ((month - 100, 1), (month + 100, 0)):
        with service.uow.writing() as session:
            session.execute(update(WebhookDelivery).values(created_at=now_seconds() - age))
            session.execute(update(Webhook).values(disabled_at=now_seconds() - age))
        collect(service.uow, service.store, service.settings)
        assert (len(deliveries(client)), len(client.get("/webhooks").json()["data"])) == (left, left)


def test_a_webhook_in_use_outlives_its_deliveries(client: TestClient) -> None:
    hook = create(client, "https://example.org/")
    service = service_of(client)
    with service.uow.writing() as session:
        session.execute(update(Webhook).values(created_at=0.0))
    assert collect(service.uow, service.store, service.settings).deliveries == 0
    assert [row["id"] for row in client.get("/webhooks").json()["data"]] == [hook["id"]]


def test_a_slow_receiver_delays_neither_sweeps_nor_other_receivers(
    client: TestClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "_TOTAL_SECONDS", 2.0)
    service = service_of(client)
    stop, released, sweeps = threading.Event(), threading.Event(), []
    receiver.before_response = lambda: released.wait(10)
    with receiving() as prompt_receiver:
        for url in (receiver.url, prompt_receiver.url):
            create(client, url)
        for _ in range(8):
            cancelled_job(client)
        thread = threading.Thread(target=maintain, args=(service, stop, lambda: sweeps.append(time.monotonic())))
        begun = time.monotonic()
        thread.start()
        try:
            while len(prompt_receiver.requests) < 5 or len(sweeps) < 3:
                assert time.monotonic() - begun < 10
                time.sleep(0.05)
            assert not released.is_set()
            pauses = [later - earlier for earlier, later in pairwise(sweeps)]
            assert max(pauses) < 1.5  # every half second here
        finally:
            released.set()
            stop.set()
            thread.join()


def test_the_receiver_of_the_how_to_page_verifies_messages(client: TestClient, tmp_path: Path) -> None:
    [code] = blocks("docs/how-to/receive-webhooks.md", "python")
    port = free_port()
    hook = create(client, f"http://127.0.0.1:{port}/")
    (tmp_path / "receiver.py").write_text(replaced(code, {"9100": str(port)}), "utf-8")
    command = [sys.executable, str(tmp_path / "receiver.py")]
    environment = os.environ | {"WEBHOOK_SECRET": hook["secret"]}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: is_listening(port))
            job = cancelled_job(client)
            deliver_due(service_of(client))
            assert deliveries(client)[0]["last_status"] == 204
            assert process.stdout is not None
            assert process.stdout.readline().decode().split() == ["job.cancelled", job]
            forged = {"webhook-id": "dlv_x", "webhook-timestamp": str(int(time.time())), "webhook-signature": "v1,eA=="}
            assert outgoing.post(hook["url"], forged, b"{}", allow_loopback=True) == 401
        finally:
            process.kill()


def test_a_message_is_json_with_a_time(client: TestClient, receiver: Receiver) -> None:
    create(client, receiver.url)
    cancelled_job(client)
    deliver_due(service_of(client))
    message = json.loads(receiver.requests[0][1])
    assert set(message) == {"type", "timestamp", "data"}
    assert message["timestamp"].endswith("+00:00")
