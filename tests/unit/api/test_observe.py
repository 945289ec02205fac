"""Request ids, security headers and the access log."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.access import require_scope
from api.main import create_app
from service import logs
from tests.service import settings_for

ADMIN = "dfk_" + "a1" * 20


class LineRecorder(logging.Handler):
    """Records the formatted log lines."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(formatter)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture
def observed(tmp_path: Path) -> Iterator[tuple[TestClient, LineRecorder]]:
    """The application with API keys and a failing route, and its log lines."""
    settings = settings_for(
        tmp_path / "data", tmp_path / "tiny", auth=True, bootstrap_admin_key=SecretStr(ADMIN), log_format="json"
    )
    app = create_app(settings)
    router = APIRouter(dependencies=[require_scope("read")])
    router.add_api_route("/fails", _fails)
    app.include_router(router)
    lines = LineRecorder(logs.formatter_of(settings))
    logger = logging.getLogger("api")
    logger.addHandler(lines)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    with TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client, lines
    logger.removeHandler(lines)
    logger.setLevel(level)


def _fails() -> None:
    raise RuntimeError(f"something with {ADMIN} in it")


@pytest.mark.parametrize(
    ("path", "status"), [("/jobs", 200), ("/nowhere", 404), ("/fails", 500), ("/docs", 200), ("/healthz", 200)]
)
def test_every_response_has_a_request_id_and_security_headers(
    observed: tuple[TestClient, LineRecorder], path: str, status: int
) -> None:
    client, _ = observed
    responses = [client.get(path), client.get(path)]
    assert [response.status_code for response in responses] == [status, status]
    ids = [response.headers["x-request-id"] for response in responses]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    for name, value in {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }.items():
        assert responses[0].headers[name] == value
    policy = responses[0].headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "://" not in policy
    assert not [name for name in responses[0].headers if name.startswith("access-control-")]


def test_responses_of_the_middleware_have_them_too(observed: tuple[TestClient, LineRecorder]) -> None:
    client, _ = observed
    unauthorized = client.get("/jobs", headers={"Authorization": "Bearer no"})
    too_long = client.post("/rounds", content=b"x" * 2_000_000, headers={"Content-Type": "application/json"})
    assert (unauthorized.status_code, too_long.status_code) == (401, 413)
    for response in (unauthorized, too_long):
        assert response.headers["x-request-id"]
        assert response.headers["x-content-type-options"] == "nosniff"


def test_cross_origin_requests_get_no_cors_headers(observed: tuple[TestClient, LineRecorder]) -> None:
    client, _ = observed
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/rounds", headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("request_id", "kept"), [("abc-1.2_3", True), ("x" * 100, True), ("x" * 101, False), ("a b", False), ("", False)]
)
def test_a_valid_client_request_id_is_kept(
    observed: tuple[TestClient, LineRecorder], request_id: str, kept: bool
) -> None:
    client, _ = observed
    response = client.get("/healthz", headers={"X-Request-Id": request_id})
    assert (response.headers["x-request-id"] == request_id) is kept


def test_a_request_is_logged_on_one_line_with_its_id_and_key(observed: tuple[TestClient, LineRecorder]) -> None:
    client, lines = observed
    client.get("/jobs?limit=3", headers={"X-Request-Id": "mine"})
    [line] = [json.loads(text) for text in lines.texts]
    assert (line["message"], line["request_id"], line["level"]) == ("GET /jobs 200", "mine", "info")
    assert (line["method"], line["path"], line["status"]) == ("GET", "/jobs", 200)
    assert line["api_key_id"].startswith("key_")
    assert "limit" not in lines.texts[0]


def test_probes_are_logged_at_debug_level(observed: tuple[TestClient, LineRecorder]) -> None:
    client, lines = observed
    client.get("/healthz")
    assert [json.loads(text)["level"] for text in lines.texts] == ["debug"]


def test_an_error_is_logged_with_its_request_id_and_without_secrets(observed: tuple[TestClient, LineRecorder]) -> None:
    client, lines = observed
    client.get("/fails", headers={"X-Request-Id": "mine"})
    client.get(f"/jobs/{ADMIN}")
    client.post("/api-keys", json={"name": "ann", "scopes": ["read"]})
    records = [json.loads(text) for text in lines.texts]
    [failure] = [record for record in records if "traceback" in record]
    assert (failure["request_id"], "RuntimeError" in failure["traceback"]) == ("mine", True)
    assert len(records) == 4
    assert [text for text in lines.texts if ADMIN in text] == []
