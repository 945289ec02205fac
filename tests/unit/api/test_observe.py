"""What is around every answer."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.access import needs
from api.main import create_app
from service import logs
from tests.service import settings_for

ADMIN = "dfk_" + "a1" * 20


class Lines(logging.Handler):
    """Keeps what the application logs, as JSON."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(formatter)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture
def observed(tmp_path: Path) -> Iterator[tuple[TestClient, Lines]]:
    """The application with keys and a route that fails, and its log."""
    settings = settings_for(
        tmp_path / "data", tmp_path / "tiny", auth=True, bootstrap_admin_key=SecretStr(ADMIN), log_format="json"
    )
    app = create_app(settings)
    router = APIRouter(dependencies=[needs("read")])
    router.add_api_route("/fails", _fails)
    app.include_router(router)
    lines, logger = Lines(logs.formatter_of(settings)), logging.getLogger("api")
    logger.addHandler(lines)
    level, logger.level = logger.level, logging.DEBUG
    with TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client, lines
    logger.removeHandler(lines)
    logger.setLevel(level)


def _fails() -> None:
    raise RuntimeError(f"something with {ADMIN} in it")


@pytest.mark.parametrize(
    ("path", "status"), [("/jobs", 200), ("/nowhere", 404), ("/fails", 500), ("/docs", 200), ("/healthz", 200)]
)
def test_every_answer_has_an_id_and_safe_headers(observed: tuple[TestClient, Lines], path: str, status: int) -> None:
    client, _ = observed
    answers = [client.get(path), client.get(path)]
    assert [answer.status_code for answer in answers] == [status, status]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    for name, value in {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }.items():
        assert answers[0].headers[name] == value
    policy = answers[0].headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert ("https://cdn.jsdelivr.net" in policy) is (path == "/docs")
    assert not [name for name in answers[0].headers if name.startswith("access-control-")]


def test_answers_of_the_door_have_them_too(observed: tuple[TestClient, Lines]) -> None:
    client, _ = observed
    refused = client.get("/jobs", headers={"Authorization": "Bearer no"})
    too_long = client.post("/rounds", content=b"x" * 2_000_000, headers={"Content-Type": "application/json"})
    assert (refused.status_code, too_long.status_code) == (401, 413)
    for answer in (refused, too_long):
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_other_sites_are_told_nothing(observed: tuple[TestClient, Lines]) -> None:
    client, _ = observed
    ask = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/rounds", headers=ask)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2_3", True), ("x" * 100, True), ("x" * 101, False), ("a b", False), ("", False)]
)
def test_a_plain_request_id_is_kept(observed: tuple[TestClient, Lines], given: str, kept: bool) -> None:
    client, _ = observed
    answer = client.get("/healthz", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) is kept


def test_a_request_is_one_line_with_its_id_and_key(observed: tuple[TestClient, Lines]) -> None:
    client, lines = observed
    client.get("/jobs?limit=3", headers={"X-Request-Id": "mine"})
    [line] = [json.loads(text) for text in lines.texts]
    assert (line["message"], line["request_id"], line["level"]) == ("GET /jobs 200", "mine", "info")
    assert (line["method"], line["path"], line["status"]) == ("GET", "/jobs", 200)
    assert line["api_key_id"].startswith("key_")
    assert "limit" not in lines.texts[0]


def test_probes_are_logged_quietly(observed: tuple[TestClient, Lines]) -> None:
    client, lines = observed
    client.get("/healthz")
    assert [json.loads(text)["level"] for text in lines.texts] == ["debug"]


def test_a_failure_is_logged_with_its_request_and_without_secrets(observed: tuple[TestClient, Lines]) -> None:
    client, lines = observed
    client.get("/fails", headers={"X-Request-Id": "mine"})
    client.get(f"/jobs/{ADMIN}")
    client.post("/api-keys", json={"name": "ann", "scopes": ["read"]})
    found = [json.loads(text) for text in lines.texts]
    [failure] = [line for line in found if "traceback" in line]
    assert (failure["request_id"], "RuntimeError" in failure["traceback"]) == ("mine", True)
    assert len(found) == 4
    assert [text for text in lines.texts if ADMIN in text] == []
