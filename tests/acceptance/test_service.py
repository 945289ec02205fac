"""The service in both modes, as processes, used over HTTP as users do."""

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from tests import forking, invariants
from tests.deployment import DEPLOYED, EMBEDDED, PATIENCE_SECONDS, WORKERS, Deployment, deployment, until
from tests.installation import Installation
from tests.servers import free_port
from tests.service import PROMPTS, round_body, settings_for

STEPS = {"num_steps": 4}
TRAINING = {"examples_per_update": 8, "micro_batch": 16, "inner_epochs": 1, "timestep_fraction": 0.25}
SAMPLING: dict[str, Any] = {
    "model": "tiny",
    "prompts": [
        {"text": f"a red and striped circle, number {n}", "items": ["circle"], "thresholds": [0.02]} for n in range(16)
    ],
    "samples_per_prompt": 4,
    "seed": 3,
    "sampling": {"num_steps": 12},
    "scorers": ["brightness"],
}
"""Eight shards, so that two workers have something to share."""


@pytest.fixture(scope="module")
def round_job(installed: Deployment) -> dict[str, Any]:
    return installed.done("/rounds", round_body())


@pytest.fixture(scope="module")
def sampled(installed: Deployment, round_job: dict[str, Any]) -> dict[str, Any]:
    assert round_job["state"] == "succeeded"
    _warm_up(installed)
    return installed.done("/samplings", SAMPLING)


@pytest.fixture(scope="module")
def fused(installed: Deployment, sampled: dict[str, Any]) -> dict[str, Any]:
    fusion = {"first_step": 1, "last_step": 11}
    body = {"sampling": sampled["id"], "fusion": fusion, "reward": "brightness"}
    return installed.done("/fusions", body)


@pytest.fixture(scope="module")
def trained(installed: Deployment, fused: dict[str, Any]) -> dict[str, Any]:
    return installed.done("/trainings", {"jobs": [fused["id"]], "training": TRAINING, "seed": 5})


def _warm_up(installed: Deployment) -> None:
    """Submit small jobs until every worker has loaded the model."""
    body = SAMPLING | {"sampling": STEPS, "samples_per_prompt": 1, "seed": 1}
    for _ in range(20):
        installed.done("/samplings", body)
        if {worker["model"] for worker in installed.get("/workers")["data"]} == {"tiny"}:
            return
    raise AssertionError("a worker stays idle")


def test_a_round_is_followed_as_it_happens(installed: Deployment) -> None:
    """With server-sent events, from the first event and from the middle, and with a long poll."""
    with installed.client() as client:
        job_id = installed.accept(client.post("/rounds", json=round_body(seed=11)))
        seen = list(_stream(client, job_id))
        job = client.get(f"/jobs/{job_id}", params={"wait": 60}).json()
        rest = list(_stream(client, job_id, after=seen[4][0]))
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert job["outputs"] == {"samples": 24, "pairs": 6, "models": 1}
    assert job["progress"]["percent"] == 100
    assert rest == seen[5:]
    listed = installed.all(job["links"]["events"])
    assert [(str(event["id"]), event["kind"]) for event in listed] == seen
    assert (seen[0][1], seen[-1][1]) == ("job.created", "job.succeeded")
    for name in ("events", "metrics", "samples", "pairs", "models"):
        assert installed.get(job["links"][name])["data"]
    with installed.client() as client:
        assert "job.succeeded" in client.get(f"/jobs/{job_id}/logs").text


def _stream(client: httpx.Client, job_id: str, after: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield the ids and kinds of events until the stream ends."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
            elif fields.get("event") == "end":
                return
            elif "id" in fields:
                yield fields["id"], json.loads(fields["data"])["kind"]
                fields = {}


def test_a_sampling_is_the_same_in_every_mode(
    installed: Deployment, sampled: dict[str, Any], expected: list[tuple[Any, ...]]
) -> None:
    assert sampled["outputs"]["samples"] == 64
    assert sum(stage["kind"] == "sample" for stage in installed.all(sampled["links"]["stages"])) == 8
    with installed.client() as client:
        assert _samples(client, sampled["id"]) == expected


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> list[tuple[Any, ...]]:
    """The samples that one worker creates for SAMPLING, without servers."""
    with TestClient(create_app(settings_for(tmp_path_factory.mktemp("alone"), pipeline))) as client:
        return _samples(client, Installation(client).done("/samplings", SAMPLING)["id"])


def _samples(client: httpx.Client, job_id: str) -> list[tuple[Any, ...]]:
    """Return prompt, number, seed, scores and the image's SHA-256 of each sample."""
    samples = [
        (
            sample["prompt_index"],
            sample["number"],
            sample["seed"],
            [(score["scorer"], score["value"]) for score in sample["scores"]],
            hashlib.sha256(client.get(sample["image"]).content).hexdigest(),
        )
        for sample in client.get("/samples", params={"job": job_id, "limit": 200}).json()["data"]
    ]
    return sorted(samples)


def test_two_workers_share_a_sampling_and_load_the_model_once(installed: Deployment, sampled: dict[str, Any]) -> None:
    """In deployed mode. The embedded mode has one worker, which also loads the model once."""
    owners = {
        event["stage"]: event["data"]["worker"]
        for event in installed.all(sampled["links"]["events"])
        if event["kind"] == "stage.started"
    }
    shards = [
        (owners[stage["id"]], stage["started_at"], stage["finished_at"])
        for stage in installed.all(sampled["links"]["stages"])
        if stage["kind"] == "sample"
    ]
    at_once = [
        (owner, other_owner)
        for owner, start, end in shards
        for other_owner, other_start, other_end in shards
        if owner < other_owner and start < other_end and other_start < end
    ]
    workers = WORKERS if installed.mode == DEPLOYED else ("api",)
    assert len({owner for owner, *_ in shards}) == len(workers)
    assert bool(at_once) == (installed.mode == DEPLOYED)
    loads = [installed.log(name).read_text("utf-8").count("the model tiny is loaded") for name in workers]
    assert loads == [1] * len(workers)


def test_stored_samples_are_fused_and_trained_on(installed: Deployment, trained: dict[str, Any]) -> None:
    assert trained["outputs"]["models"] == 1
    model = installed.get(f"/models/{trained['last_model']}")
    assert [entry["name"] for entry in installed.get(f"/models/{model['id']}/lineage")["data"]] == [None, "tiny"]


def test_models_are_compared(installed: Deployment, trained: dict[str, Any]) -> None:
    body = {"models": ["tiny", trained["last_model"]], "prompts": PROMPTS, "samples_per_prompt": 2, "sampling": STEPS}
    job = installed.done("/evaluations", body | {"scorers": ["brightness"], "resamples": 100})
    [compared] = job["result"]["splits"]["prompts"]["compared_with_the_first"]
    low, high = compared["difference"]["interval"]
    assert low <= compared["difference"]["mean"] <= high


def test_an_adapter_is_exported_and_downloaded(installed: Deployment, trained: dict[str, Any]) -> None:
    installed.done("/exports", {"model": trained["last_model"], "format": "kohya"})
    with installed.client() as client:
        for form in ("kohya", "diffusers"):
            response = client.get(f"/models/{trained['last_model']}/download?format={form}", follow_redirects=True)
            assert response.status_code == 200
            assert int.from_bytes(response.content[:8], "little") < len(
                response.content
            )  # safetensors: the header's size


LONG = {"model": "tiny", "prompts": PROMPTS, "samples_per_prompt": 8, "sampling": {"num_steps": 60}}


def test_a_job_is_paused_and_resumed(installed: Deployment) -> None:
    job_id = installed.post("/samplings", LONG)
    until(lambda: installed.get(f"/jobs/{job_id}")["progress"]["done"] > 0)
    with installed.client() as client:
        assert client.post(f"/jobs/{job_id}/pause").status_code == 202
        until(lambda: installed.get(f"/jobs/{job_id}")["state"] == "paused")
        assert installed.running(job_id, "sample") is None
        assert client.post(f"/jobs/{job_id}/resume").status_code == 202
    job = installed.ended(job_id)
    assert (job["state"], job["outputs"]["samples"]) == ("succeeded", 24)


def test_a_cancelled_job_stops_while_it_runs_and_is_tried_again(installed: Deployment) -> None:
    job_id = installed.post("/samplings", LONG | {"samples_per_prompt": 64})
    until(lambda: installed.get(f"/jobs/{job_id}")["progress"]["done"] > 0)
    with installed.client() as client:
        assert client.post(f"/jobs/{job_id}/cancel").json()["state"] in ("cancelling", "cancelled")
        job = installed.ended(job_id)
        assert (job["state"], job["outputs"]["samples"]) == ("cancelled", 0)
        again = installed.accept(client.post(f"/jobs/{job_id}/retry"))
        assert again != job_id
        assert [listed["id"] for listed in installed.all(f"/jobs?origin={job_id}")] == [again]
        client.post(f"/jobs/{again}/cancel")
    assert installed.ended(again)["state"] == "cancelled"


def test_a_review_waits_for_verdicts(installed: Deployment) -> None:
    job_id = installed.post("/rounds", round_body(review=True, evaluation=None))
    until(lambda: installed.get(f"/jobs/{job_id}")["state"] == "waiting")
    with installed.client() as client:
        for pair in installed.all(f"/pairs?job={job_id}"):
            etag = client.get(pair["links"]["self"]).headers["etag"]
            put = lambda prefer, tag=etag, path=pair["links"]["self"]: client.put(  # noqa: E731
                f"{path}/verdict", json={"prefer": prefer}, headers={"If-Match": tag}
            )
            assert (put("target").status_code, put("base").status_code) == (200, 412)
    assert installed.ended(job_id)["state"] == "succeeded"


def test_an_artifact_is_read_whole_in_part_and_not_again(installed: Deployment, round_job: dict[str, Any]) -> None:
    path = installed.get(f"/models/{round_job['last_model']}")["adapter"]["artifact"]
    with installed.client() as client:
        whole = client.get(path)
        etag = whole.headers["etag"]
        assert etag == f'"{hashlib.sha256(whole.content).hexdigest()}"'
        part = client.get(path, headers={"Range": "bytes=8-107"})
        assert (part.status_code, part.content) == (206, whole.content[8:108])
        assert part.headers["content-range"] == f"bytes 8-107/{len(whole.content)}"
        assert client.get(path, headers={"Range": "bytes=-5"}).content == whole.content[-5:]
        assert client.get(path, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
        assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
        head = client.head(path)
        assert (head.headers["etag"], int(head.headers["content-length"])) == (etag, len(whole.content))


def test_a_presigned_link_leads_to_the_bytes_by_another_host_name(
    installed: Deployment, round_job: dict[str, Any]
) -> None:
    """A second API process of the same installation, for clients that reach the S3 server as localhost."""
    if installed.servers is None:
        pytest.skip("files have no address of their own")
    path = installed.get(f"/models/{round_job['last_model']}")["adapter"]["artifact"]
    port, public = free_port(), f"http://localhost:{installed.servers.s3.port}"
    installed.start_api("second-front", port=port, s3_public_endpoint=public)
    with installed.client() as client, installed.client(port) as other, httpx.Client(trust_env=False) as anyone:
        response = other.get(path)
        assert response.status_code == 307
        link = response.headers["location"]
        assert link.startswith(f"{public}/")
        assert anyone.get(link).content == client.get(path).content
        unsigned = anyone.get(link.partition("?")[0])
        assert unsigned.status_code == 400  # rclone's status for a missing signature; S3 itself returns 403
        assert unsigned.content != client.get(path).content
    installed.process["second-front"].terminate()
    assert installed.process["second-front"].wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)


def test_a_request_with_a_key_makes_one_job(installed: Deployment) -> None:
    body = SAMPLING | {"prompts": PROMPTS[:1], "sampling": STEPS}
    key = {"Idempotency-Key": "once"}
    job_id = installed.post("/samplings", body, **key)
    assert installed.post("/samplings", body, **key) == job_id
    with installed.client() as client:
        assert client.post("/samplings", json=body | {"seed": 4}, headers=key).status_code == 422
    assert installed.ended(job_id)["state"] == "succeeded"


def test_an_operator_sees_workers_and_progress(installed: Deployment, round_job: dict[str, Any]) -> None:
    assert round_job["state"] == "succeeded"
    workers = installed.get("/workers")["data"]
    assert len(workers) == (2 if installed.mode == DEPLOYED else 1)
    assert {(worker["device"], worker["model"]) for worker in workers} == {("cpu", "tiny")}
    assert installed.get("/readyz")["status"] == "ok"
    with installed.client() as client:
        figures = client.get("/metrics").text
        paths = client.get("/openapi.json").json()["paths"]
    assert 'dfusion_jobs{state="succeeded"}' in figures
    assert {"/rounds", "/jobs/{job_id}", "/samples/{sample_id}", "/pairs", "/artifacts/{artifact_id}"} <= set(paths)
    anyone = httpx.get(f"http://127.0.0.1:{installed.settings.port}/jobs", trust_env=False)
    assert anyone.status_code == (401 if installed.mode == DEPLOYED else 200)


def test_only_one_service_has_a_data_folder(installed: Deployment) -> None:
    """In embedded mode. Deployed services share their database."""
    if installed.mode == DEPLOYED:
        pytest.skip("several fronts are meant to be there")
    environment = installed.settings.model_copy(update={"port": free_port()}).for_child()
    second = forking.run(["-m", "api"], installed.folder, environment)
    assert second.returncode != 0
    assert "another process holds" in second.stdout


def test_what_is_left_in_the_end_is_in_order(installed: Deployment) -> None:
    """After all tests above, and the jobs that they created."""
    for job_id in installed.accepted:
        assert installed.ended(job_id)["state"] in ("succeeded", "cancelled")
    log = installed.logs()
    invariants.check(installed.service, installed.accepted, log, installed.secrets)
    assert "Fatal Python error" not in log
    assert "Traceback" not in log


def test_an_embedded_worker_ends_with_its_service(tmp_path: Path, pipeline: Path) -> None:
    with deployment(EMBEDDED, tmp_path, pipeline) as installation:
        worker = until(installation.embedded_worker)
        installation.process["api"].kill()
        worker.wait(PATIENCE_SECONDS)
