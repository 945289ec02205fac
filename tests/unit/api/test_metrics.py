"""GET /metrics: metrics of requests, and of jobs from the database."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from api import metrics as api_metrics
from api.main import create_app
from service import preference_tests
from service.db.queries import statistics
from service.db.tables import Stage
from service.jobs import execution
from service.jobs.execution import Claim, StageFailure
from service.preference_tests import NewTest
from service.service import Service
from tests.drawn_results import draw_evaluation
from tests.service import round_body, service_of, settings_for
from tests.statements import statements

ROOT = Path(__file__).parents[3]
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the database at each scrape."""
    monkeypatch.setattr(api_metrics, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(api_metrics, "_REST_PER_READ", 0.0)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """The application, with two attempts per stage."""
    settings = settings_for(tmp_path / "data", tmp_path / "tiny", max_attempts=2, retry_seconds=1e-6)
    with TestClient(create_app(settings)) as opened:
        yield opened


def scrape(client: TestClient) -> Figures:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def of(metrics: Figures, name: str, **labels: str) -> float:
    return metrics[name, frozenset(labels.items())]


def take(service: Service, owner: str = "w") -> Claim:
    held = execution.claim(service.uow, service.settings, owner)
    assert held is not None
    return held


def test_requests_are_counted_by_template_and_never_by_path(client: TestClient) -> None:
    for path in ("/jobs", "/jobs", "/jobs/one", "/jobs/two", "/nowhere", "/no/where", "/wp-login.php"):
        client.get(path)
    client.request("BREW", "/jobs")
    metrics = scrape(client)
    assert of(metrics, "dfusion_http_requests_total", method="GET", route="/jobs", status="200") == 2
    assert of(metrics, "dfusion_http_requests_total", method="GET", route="/jobs/{job_id}", status="404") == 2
    assert of(metrics, "dfusion_http_requests_total", method="GET", route="none", status="404") == 3
    assert of(metrics, "dfusion_http_request_seconds_count", method="GET", route="/jobs/{job_id}") == 2
    methods = {dict(labels).get("method") for name, labels in metrics if name == "dfusion_http_requests_total"}
    assert methods == {"GET", "other"}


def test_two_applications_do_not_share_figures(client: TestClient, tmp_path: Path) -> None:
    client.get("/jobs")
    with TestClient(create_app(settings_for(tmp_path / "other", tmp_path / "tiny"))) as other:
        assert not [labels for name, labels in scrape(other) if name == "dfusion_http_requests_total"]


def test_an_application_that_starts_again_still_has_its_figures(tmp_path: Path) -> None:
    app = create_app(settings_for(tmp_path / "data", tmp_path / "tiny"))
    for _ in range(2):
        with TestClient(app) as client:
            assert of(scrape(client), "dfusion_database_up") == 1


def test_the_queue_is_seen_as_it_is(client: TestClient, service: Service) -> None:
    empty = scrape(client)
    assert of(empty, "dfusion_jobs", state="queued") == 0
    assert of(empty, "dfusion_stages", state="queued", kind="sample") == 0
    assert of(empty, "dfusion_oldest_ready_stage_seconds") == 0
    for seed in (1, 2):
        client.post("/rounds", json=round_body(seed=seed))
    metrics = scrape(client)
    assert of(metrics, "dfusion_jobs", state="queued") == 2
    # each: evaluate before, 2 x sample, score, select, 2 x fuse, verify, train, evaluate after
    assert of(metrics, "dfusion_stages", state="queued", kind="sample") == 4
    assert of(metrics, "dfusion_stages", state="queued", kind="evaluate") == 4
    assert of(metrics, "dfusion_stages_ready", kind="evaluate") == 2
    assert of(metrics, "dfusion_stages_ready", kind="score") == 0
    take(service, "first")
    take(service, "first")
    take(service, "second")
    metrics = scrape(client)
    assert of(metrics, "dfusion_jobs", state="running") == 1
    assert of(metrics, "dfusion_stages", state="running", kind="sample") == 2
    assert of(metrics, "dfusion_stages", state="running", kind="evaluate") == 1
    assert of(metrics, "dfusion_stages_ready", kind="evaluate") == 1
    assert of(metrics, "dfusion_workers_busy") == 2
    assert of(metrics, "dfusion_leases_expired") == 0


def test_a_stage_waits_from_when_nothing_stood_in_its_way(client: TestClient, service: Service) -> None:
    client.post("/rounds", json=round_body(evaluation=None))
    held = [take(service), take(service)]
    with service.uow.writing() as session:
        session.execute(update(Stage).values(not_before=Stage.not_before - 5000))
    for claimed in held:
        execution.finish(service.uow, service.settings, claimed, lambda _: None)
    with service.uow.writing() as session:  # the last sampling ended 1,000 seconds ago, the other one long before
        for seconds, claimed in zip((3000, 1000), held, strict=True):
            ended = update(Stage).where(Stage.id == claimed.stage_id)
            session.execute(ended.values(finished_at=Stage.finished_at - seconds))
    assert 1000 <= of(scrape(client), "dfusion_oldest_ready_stage_seconds") < 1100


def test_lost_workers_and_failed_attempts_are_counted(client: TestClient, service: Service) -> None:
    client.post("/rounds", json=round_body())
    take(service)
    with service.uow.writing() as session:
        session.execute(update(Stage).where(Stage.state == "running").values(lease_expires_at=1.0))
    assert of(scrape(client), "dfusion_leases_expired") == 1
    execution.sweep(service.uow, service.settings)
    metrics = scrape(client)
    assert (of(metrics, "dfusion_leases_expired"), of(metrics, "dfusion_lease_losses_total")) == (0, 1)
    for _ in range(2):
        held = take(service)
        execution.fail(service.uow, service.settings, held, StageFailure("storage", "away", True))
    metrics = scrape(client)
    assert of(metrics, "dfusion_failed_attempts_total", code="worker_lost") == 1
    assert of(metrics, "dfusion_failed_attempts_total", code="storage") == 2
    assert of(metrics, "dfusion_jobs", state="failed") == 1


def test_answers_of_raters_are_counted(client: TestClient, service: Service) -> None:
    assert of(scrape(client), "dfusion_preference_answers") == 0
    test = preference_tests.create(service, NewTest(draw_evaluation(service).job_id))
    for rater in ("ann", "bob", "bob"):
        preference_tests.answer(service, test.id, 0, rater, 1)
    assert of(scrape(client), "dfusion_preference_answers") == 2


def test_stage_times_are_sorted_into_buckets(client: TestClient, service: Service) -> None:
    client.post("/rounds", json=round_body())
    for seconds in (1.0, 3.0, 60.0, 10_000.0):  # evaluate, compare, then both samples
        held = take(service)
        execution.finish(service.uow, service.settings, held, lambda _: None)
        with service.uow.writing() as session:
            ended = update(Stage).where(Stage.id == held.stage_id)
            session.execute(ended.values(started_at=1000.0, finished_at=1000.0 + seconds))
    metrics = scrape(client)
    assert of(metrics, "dfusion_stage_seconds_count", kind="evaluate") == 1
    assert of(metrics, "dfusion_stage_seconds_bucket", kind="evaluate", le="0.5") == 0
    assert of(metrics, "dfusion_stage_seconds_bucket", kind="evaluate", le="2.0") == 1
    sample = {
        le: of(metrics, "dfusion_stage_seconds_bucket", kind="sample", le=le)
        for le in (*map(str, statistics.STAGE_BUCKETS), "+Inf")
    }
    assert sample == {"0.5": 0, "2.0": 0, "10.0": 0, "60.0": 1, "300.0": 1, "1800.0": 1, "7200.0": 1, "+Inf": 2}
    assert of(metrics, "dfusion_stage_seconds_sum", kind="sample") == 10_060


def test_a_stage_that_never_started_has_no_duration(client: TestClient, service: Service) -> None:
    client.post("/rounds", json=round_body())
    held = take(service)
    execution.finish(service.uow, service.settings, held, lambda _: None)
    with service.uow.writing() as session:  # as people's reviews are
        session.execute(update(Stage).where(Stage.id == held.stage_id).values(started_at=None))
    assert not [name for name, _ in scrape(client) if name.startswith("dfusion_stage_seconds_")]


def test_the_manual_names_every_figure(client: TestClient) -> None:
    client.get("/jobs")
    manual = (ROOT / "docs" / "operations.md").read_text("utf-8")
    families = text_string_to_metric_families(client.get("/metrics").text)
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    named = set(re.findall(r"`(dfusion_[a-z_]+)", manual))
    assert {name for name in names if not name.endswith("_created")} == named


def test_free_disk_space_is_a_metric(client: TestClient) -> None:
    assert of(scrape(client), "dfusion_free_disk_bytes") > 0


def test_metrics_report_an_unavailable_database(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise OperationalError("select", {}, Exception("away"))

    client.get("/jobs")
    monkeypatch.setattr(statistics, "leases", away)
    metrics = scrape(client)
    assert of(metrics, "dfusion_database_up") == 0
    assert of(metrics, "dfusion_http_requests_total", method="GET", route="/jobs", status="200") == 1
    assert not [name for name, _ in metrics if name.startswith("dfusion_jobs")]


@pytest.mark.parametrize(("name", "value"), [("_FRESH_SECONDS", 1e6), ("_REST_PER_READ", 1e12)])
def test_the_database_rests_between_scrapes(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    """For a fixed time, and for a multiple of the time that a scrape takes."""
    client.post("/rounds", json=round_body())
    monkeypatch.setattr(api_metrics, name, value)
    with statements(service_of(client).uow.engine) as sent:
        assert of(scrape(client), "dfusion_jobs", state="queued") == 1
        assert len(sent) > 0
        sent.clear()
        assert of(scrape(client), "dfusion_jobs", state="queued") == 1
        assert sent == []
    assert of(scrape(client), "dfusion_http_requests_total", method="GET", route="/metrics", status="200") == 2


def test_an_outage_is_not_reported_for_longer(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise OperationalError("select", {}, Exception("away"))

    monkeypatch.setattr(api_metrics, "_FRESH_SECONDS", 1e6)
    monkeypatch.setattr(api_metrics, "_OUTAGE_SECONDS", 0.0)
    with monkeypatch.context() as outage:
        outage.setattr(statistics, "leases", away)
        assert of(scrape(client), "dfusion_database_up") == 0
    assert of(scrape(client), "dfusion_database_up") == 1
