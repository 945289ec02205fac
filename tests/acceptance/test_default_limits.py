"""What happens at the default limits, where other tests use shorter ones."""

from pathlib import Path
from typing import Any

from service.settings import Settings
from tests.deployment import EMBEDDED, HASTE, Deployment, deployment, until
from tests.service import round_body


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
