"""The service as its users start it: `python -m api`, with its worker, followed over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.service import round_body, settings_for

PATIENCE_SECONDS = 300
"""How long nothing may change: a machine that is busy with something else starts a worker in minutes."""
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(data_dir: Path, pipeline: Path, **changes: Any) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """The service as a process; a client of it once it is ready."""
    port = free_port()
    defaults = {"embedded_worker": True, "port": port, "lease_seconds": PATIENCE_SECONDS}
    settings = settings_for(data_dir, pipeline, **(defaults | changes))
    environment = settings.for_child() | {"PYTHONPATH": str(ROOT)}
    with (
        subprocess.Popen([sys.executable, "-m", "api"], cwd=data_dir.parent, env=environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=70) as client,
    ):
        try:
            until(lambda: is_ready(client, process))
            yield client, process
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def is_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the service ended"
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job once it has ended, by long polls."""
    before, deadline = None, 0.0
    while True:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}", params={"wait": 10}).json()
        if job["state"] in ("succeeded", "failed", "cancelled"):
            return job
        now = [(stage["state"], stage["done"]) for stage in job["stages"]]
        if now != before:
            before, deadline = now, time.monotonic() + PATIENCE_SECONDS
        assert time.monotonic() < deadline, "the job stands still"


def worker_of(service: subprocess.Popen[bytes]) -> psutil.Process | None:
    children = psutil.Process(service.pid).children()
    return next((child for child in children if "worker.local" in " ".join(child.cmdline())), None)


def test_a_round_from_request_to_review(tmp_path: Path, pipeline: Path) -> None:
    with running(tmp_path / "data", pipeline) as (client, process):
        answer = client.post("/rounds", json=round_body())
        assert answer.status_code == 202
        job = ended(client, answer.headers["location"].removeprefix("/jobs/"))
        assert (job["state"], job["error"]) == ("succeeded", None)
        assert job["made"] == {"samples": 24, "pairs": 6, "models": 1}
        for name in ("events", "metrics", "samples", "pairs", "models"):
            assert client.get(job["links"][name]).json()["data"]
        worker = worker_of(process)
        assert worker is not None
        second = subprocess.run(
            [sys.executable, "-m", "api"],
            cwd=tmp_path,
            env=settings_for(tmp_path / "data", pipeline, port=free_port()).for_child() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert second.returncode != 0
        assert "another process holds" in second.stderr
    worker.wait(PATIENCE_SECONDS)  # the worker ends with its service


def test_a_worker_killed_in_the_middle_of_a_stage_is_replaced(tmp_path: Path, pipeline: Path) -> None:
    with running(tmp_path / "data", pipeline) as (client, process):
        body = round_body(samples_per_prompt=8, sampling={"num_steps": 40}, fusion={"first_step": 2, "last_step": 39})
        job_id = client.post("/rounds", json=body).json()["id"]

        def in_the_middle() -> bool:
            progress = client.get(f"/jobs/{job_id}").json()["progress"]
            return progress["stage"] == "sample" and progress["done"] > 0

        until(in_the_middle)
        worker = worker_of(process)
        assert worker is not None
        worker.send_signal(signal.SIGKILL)
        job = ended(client, job_id)
        assert job["state"] == "succeeded"
        assert max(stage["crashes"] for stage in job["stages"]) == 1
        assert job["made"] == {"samples": 6 + 24 + 12, "pairs": 12, "models": 1}
        replaced = worker_of(process)
        assert replaced is not None and replaced.pid != worker.pid


def test_a_killed_service_takes_its_worker_along_and_the_next_goes_on(tmp_path: Path, pipeline: Path) -> None:
    with running(tmp_path / "data", pipeline) as (client, process):
        job_id = client.post("/rounds", json=round_body(samples_per_prompt=8)).json()["id"]
        until(lambda: client.get(f"/jobs/{job_id}").json()["state"] == "running")
        worker = worker_of(process)
        assert worker is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
        worker.wait(PATIENCE_SECONDS)
    with running(tmp_path / "data", pipeline) as (client, _):
        assert ended(client, job_id)["state"] == "succeeded"


def test_a_cancelled_job_stops_while_it_runs(tmp_path: Path, pipeline: Path) -> None:
    with running(tmp_path / "data", pipeline) as (client, _):
        body = round_body(samples_per_prompt=64, sampling={"num_steps": 50}, evaluation=None)
        job_id = client.post("/rounds", json=body).json()["id"]
        until(lambda: client.get(f"/jobs/{job_id}").json()["progress"]["done"] > 0)
        assert client.post(f"/jobs/{job_id}/cancel").json()["state"] in ("cancelling", "cancelled")
        job = ended(client, job_id)
        assert (job["state"], job["made"]["samples"]) == ("cancelled", 0)


def test_the_openapi_document_is_json_and_names_every_route(tmp_path: Path, pipeline: Path) -> None:
    with running(tmp_path / "data", pipeline, embedded_worker=False) as (client, _):
        paths = json.loads(client.get("/openapi.json").text)["paths"]
    assert {"/rounds", "/jobs/{job_id}", "/samples/{sample_id}", "/pairs", "/artifacts/{artifact_id}"} <= set(paths)


@pytest.fixture(autouse=True)
def _quiet_services(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Keep the services' logs out of the test report; no process may have broken down."""
    yield
    log = capfd.readouterr().err
    assert "Fatal Python error" not in log
    assert "Traceback" not in log
