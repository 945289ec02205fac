"""API keys, limits and metrics on PostgreSQL: the same responses as on SQLite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api.main import create_app
from service.jobs import execution
from service.jobs.execution import StageFailure
from service.service import Service
from tests.service import round_body, service_of, settings_for

ADMIN = "dfk_" + "a1" * 20


@pytest.fixture
def client(tmp_path: Path, postgres_url: str) -> Iterator[TestClient]:
    """The application with API keys on a separate PostgreSQL database."""
    settings = settings_for(
        tmp_path / "data",
        tmp_path / "tiny",
        database_url=postgres_url,
        auth=True,
        bootstrap_admin_key=SecretStr(ADMIN),
        max_queued_jobs_per_key=2,
    )
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {ADMIN}"}) as opened:
        yield opened


def test_keys_limits_and_figures(client: TestClient) -> None:
    created = client.post("/api-keys", json={"name": "ann", "scopes": ["submit"]}).json()
    ann = {"Authorization": f"Bearer {created['key']}"}
    responses = [client.post("/rounds", json=round_body(), headers=ann) for _ in range(3)]
    assert [response.status_code for response in responses] == [202, 202, 429]
    assert [key["active"] for key in client.get("/api-keys").json()["data"]] == [True, True]
    assert client.delete(f"/api-keys/{created['id']}").status_code == 204
    assert client.get("/jobs", headers=ann).status_code == 401
    _work(service_of(client))
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert values["dfusion_database_up",] == 1
    assert values["dfusion_stages_ready", "sample"] == 4
    assert values["dfusion_stage_seconds_count", "evaluate"] == 1
    assert values["dfusion_stage_seconds_bucket", "evaluate", "60.0"] == 1
    assert values["dfusion_failed_attempts_total", "storage"] == 1
    assert values["dfusion_lease_losses_total",] == 0
    assert values["dfusion_images_total", "target"] == 0


def _work(service: Service) -> None:
    """Run one evaluation, which succeeds, and one sampling, which fails with a temporary error."""
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None
    execution.finish(service.uow, service.settings, held, lambda _: None)
    held = execution.claim(service.uow, service.settings.model_copy(update={"retry_seconds": 1e-6}), "w")
    assert held is not None
    quick = service.settings.model_copy(update={"retry_seconds": 1e-6})
    execution.fail(service.uow, quick, held, StageFailure("storage", "away", True))
