"""The service as a process: startup errors and log output."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployment import PATIENCE_SECONDS, ROOT
from tests.servers import free_port
from tests.service import settings_for

ADMIN = "dfk_" + "a1" * 20


def start(data_dir: Path, log: Path, **changes: Any) -> subprocess.Popen[bytes]:
    key = changes.pop("key", "")
    settings = settings_for(data_dir, data_dir / "tiny", **changes)
    environment = settings.for_child() | {"PYTHONPATH": str(ROOT), "DFUSION_BOOTSTRAP_ADMIN_KEY": key}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "api"], cwd=data_dir.parent, env=environment, stdout=output, stderr=output
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": "0.0.0.0"}, "DFUSION_AUTH is off"),
        ({"auth": True}, "set DFUSION_BOOTSTRAP_ADMIN_KEY"),
        ({"auth": True, "key": "swordfish"}, "expected dfk_"),
    ],
)
def test_a_service_that_is_set_up_wrongly_says_why_it_does_not_start(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    log = tmp_path / "log"
    process = start(tmp_path / "data", log, port=free_port(), **changes)
    assert process.wait(PATIENCE_SECONDS) != 0
    written = log.read_text("utf-8")
    assert reason in written
    assert "swordfish" not in written


def test_the_log_is_json_without_secrets(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = start(tmp_path / "data", log, port=port, auth=True, key=ADMIN, log_format="json", log_level="debug")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            _wait_for(client, process)
            key = client.post(
                "/api-keys", json={"name": "ann", "scopes": ["read"]}, headers={"Authorization": f"Bearer {ADMIN}"}
            ).json()["key"]
            responses = [
                client.get("/jobs", headers={"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}),
                client.get(f"/jobs/{key}?key={key}", headers={"Authorization": f"Bearer {key}"}),
                client.get("/jobs", headers={"Authorization": f"Bearer {key}x"}),
            ]
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
    assert [response.status_code for response in responses] == [200, 422, 401]
    assert "server" not in responses[0].headers
    written = log.read_text("utf-8")
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["message"] for line in lines if line.get("request_id") == "mine"] == ["GET /jobs 200"]
    assert [secret for secret in (ADMIN, key) if secret in written] == []


def _wait_for(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended"
        try:
            client.get("/healthz")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("it did not respond in time")
