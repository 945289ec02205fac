"""Polling of a service in another process."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import httpx

from tests.deployment import PATIENCE_SECONDS


def is_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    """Whether the service is ready."""
    assert process.poll() is None, "the service ended"
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Wait with long polls until the job has ended. Fails if the job makes no progress for too long."""
    before: object = None
    deadline = 0.0
    while True:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}", params={"wait": 10}).json()
        if job["state"] in ("succeeded", "failed", "cancelled"):
            return job
        now = (job["state"], job["progress"] | {"eta_seconds": None}, job["outputs"])
        if now != before:
            before, deadline = now, time.monotonic() + PATIENCE_SECONDS
        assert time.monotonic() < deadline, "the job stands still"
