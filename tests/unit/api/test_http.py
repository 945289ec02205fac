"""What HTTP clients expect of any service: HEAD, repeated filters, long polls, event streams, names of downloads."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import update

from api.main import create_app
from api.routes import jobs
from service.db.tables import Job
from service.jobs.kinds import RoundSpec
from service.service import Service, cancel_job, create_job, pause_job
from service.states import JobState
from tests.live_service import serving
from tests.service import round_body, service_of, settings_for


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(settings_for(tmp_path, tmp_path / "tiny"))) as opened:
        yield opened


@pytest.fixture
def service(client: TestClient) -> Service:
    return service_of(client)


def start(service: Service) -> str:
    return create_job(service, RoundSpec.model_validate(round_body()))


def set_state(service: Service, job_id: str, state: JobState) -> None:
    with service.uow.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(state=state))


@pytest.mark.parametrize("path", ["/jobs", "/healthz", "/jobs/{job}", "/jobs/job_0", "/jobs/{job}/logs"])
def test_head_has_the_headers_of_get_and_no_body(client: TestClient, service: Service, path: str) -> None:
    path = path.format(job=start(service))
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    described = ("content-type", "content-length")
    assert [head.headers.get(name) for name in described] == [got.headers.get(name) for name in described]


def test_the_log_is_read_in_pages(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = start(service)
    pause_job(service, job_id)
    cancel_job(service, job_id)
    monkeypatch.setattr(jobs, "_EVENTS_PER_READ", 2)
    events = client.get(f"/jobs/{job_id}/events").json()["data"]
    lines = client.get(f"/jobs/{job_id}/logs").text.splitlines()
    assert len(events) > 4
    assert [line.split(" ")[1] for line in lines] == [f"{event['kind']}:" for event in events]


def test_head_of_an_endless_stream_ends(tmp_path: Path) -> None:
    app = create_app(settings_for(tmp_path, tmp_path / "tiny"))
    with serving(app) as port:
        job_id = start(app.state.service)
        headers = {"Accept": "text/event-stream"}
        url = f"http://127.0.0.1:{port}/jobs/{job_id}/events"
        response = httpx.head(url, headers=headers, trust_env=False, timeout=30)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


def test_a_repeated_filter_selects_any_of_its_values(client: TestClient, service: Service) -> None:
    queued, paused, cancelled = (start(service) for _ in range(3))
    pause_job(service, paused)
    cancel_job(service, cancelled)

    def ids(*states: str) -> list[str]:
        response = client.get("/jobs", params=[("state", state) for state in states])
        return [job["id"] for job in response.json()["data"]]

    assert ids("queued", "paused") == [paused, queued]
    assert ids("queued") == [queued]
    assert ids() == [cancelled, paused, queued]


def test_pages_of_a_repeated_filter_follow_each_other(client: TestClient, service: Service) -> None:
    newest_first = [start(service) for _ in range(5)][::-1]
    pause_job(service, newest_first[1])
    cancel_job(service, newest_first[2])
    query: list[tuple[str, str]] = [("state", "queued"), ("state", "paused"), ("limit", "2")]
    first = client.get("/jobs", params=query).json()
    second = client.get("/jobs", params=[*query, ("cursor", first["next_cursor"])]).json()
    assert [job["id"] for page in (first, second) for job in page["data"]] == [
        newest_first[0],
        newest_first[1],
        newest_first[3],
        newest_first[4],
    ]
    assert second["next_cursor"] is None


@pytest.mark.parametrize("kinds", [["sample"], ["sample", "evaluate"]])
def test_stages_of_several_kinds(client: TestClient, service: Service, kinds: list[str]) -> None:
    path = f"/jobs/{start(service)}/stages"
    expected = [stage["id"] for stage in client.get(path).json()["data"] if stage["kind"] in kinds]
    response = client.get(path, params=[("kind", kind) for kind in kinds])
    assert [stage["id"] for stage in response.json()["data"]] == expected != []


def test_a_long_poll_ends_when_the_job_waits_for_verdicts(client: TestClient, service: Service) -> None:
    job_id = start(service)
    timer = threading.Timer(0.5, set_state, (service, job_id, JobState.WAITING))
    timer.start()
    assert client.get(f"/jobs/{job_id}", params={"wait": 60}).json()["state"] == "waiting"
    timer.join()


def stream(url: str, after: str | None = None) -> httpx.Response:
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": after})
    return httpx.get(url, headers=headers, trust_env=False, timeout=30)


def test_a_plain_event_source_reads_all_events_and_does_not_reconnect_for_ever(tmp_path: Path) -> None:
    """A browser calls `onmessage` for events without a name, reconnects after the last id, and stops at 204."""
    app = create_app(settings_for(tmp_path, tmp_path / "tiny"))
    with serving(app) as port:
        job_id = start(app.state.service)
        cancel_job(app.state.service, job_id)
        url = f"http://127.0.0.1:{port}/jobs/{job_id}/events"
        blocks = [_fields(block) for block in stream(url).text.split("\n\n") if block]
        messages = [block for block in blocks if "event" not in block]
        kinds = [json.loads(message["data"])["kind"] for message in messages]
        assert (kinds[0], kinds[-1]) == ("job.created", "job.cancelled")
        assert stream(url, messages[-1]["id"]).status_code == 204
        assert stream(url, messages[-2]["id"]).status_code == 200


def _fields(block: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in block.splitlines())


def test_a_stream_ends_when_its_key_is_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_KEY_CHECK_SECONDS", 0.1)
    admin = {"Authorization": "Bearer dfk_" + "a1" * 20}
    app = create_app(
        settings_for(tmp_path, tmp_path / "tiny", auth=True, bootstrap_admin_key=SecretStr("dfk_" + "a1" * 20))
    )
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        job_id = start(app.state.service)
        key = client.post("/api-keys", json={"name": "ann", "scopes": ["read"]}, headers=admin).json()
        headers = {"Authorization": f"Bearer {key['key']}", "Accept": "text/event-stream"}
        with client.stream("GET", f"/jobs/{job_id}/events", headers=headers, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert client.delete(f"/api-keys/{key['id']}", headers=admin).status_code < 300
            assert "event: end" not in list(lines)


def test_a_follower_does_not_delay_a_stop(tmp_path: Path) -> None:
    app = create_app(settings_for(tmp_path, tmp_path / "tiny"))
    with serving(app) as port:
        job_id = start(app.state.service)
        url = f"http://127.0.0.1:{port}/jobs/{job_id}/events"
        ended: list[Any] = []
        follower = threading.Thread(target=lambda: ended.append(stream(url).text))
        follower.start()
        threading.Event().wait(0.5)
        app.state.is_stopping = True
        follower.join(30)
        assert len(ended) == 1 and "event: end" not in ended[0]
