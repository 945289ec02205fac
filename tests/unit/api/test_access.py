"""Access control, checked on every route: requests need a key, and keys are limited to their scopes."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy.exc import OperationalError

from api.access import require_scope
from api.main import create_app
from api.pages.assets import ASSETS
from service.db.queries import api_keys, jobs, results
from service.errors import StartError
from service.ids import IdKind, new_id
from service.keys import token_hash
from service.service import Service
from tests.service import round_body, service_of, settings_for
from tests.stored_pairs import Results

ADMIN = "dfk_" + "a1" * 20
ALL_SCOPES = {"read", "submit", "review", "admin"}
OPEN = {
    "/healthz",
    "/readyz",
    "/openapi.json",
    "/docs",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/docs/favicon.png",
    "/sign-in",
    *ASSETS,
}


def application(folder: Path, **changes: Any) -> FastAPI:
    values = {"auth": True, "bootstrap_admin_key": SecretStr(ADMIN)} | changes
    return create_app(settings_for(folder / "data", folder / "tiny", **values))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application with API keys, shared by all tests, which only add keys."""
    with TestClient(application(tmp_path_factory.mktemp("guarded")), raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application without API keys."""
    with TestClient(application(tmp_path_factory.mktemp("local"), auth=False)) as opened:
        yield opened


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def make_key(client: TestClient, *scopes: str, **more: Any) -> dict[str, Any]:
    body = {"name": "test", "scopes": scopes} | more
    response = client.post("/api-keys", json=body, headers=bearer(ADMIN))
    assert response.status_code == 201, response.text
    return dict(response.json())


def routes(client: TestClient) -> list[tuple[str, str]]:
    """Return all methods and paths of the application, with `x` in place of ids."""
    methods_and_paths = []
    for context in iter_route_contexts(client.app.routes):  # type: ignore[attr-defined]
        path = re.sub(r"\{[^}]*\}", "x", context.path or "")
        methods_and_paths += [(method, path) for method in sorted(context.methods or ()) if method != "HEAD"]
    return methods_and_paths


def test_without_a_key_every_route_but_the_open_ones_answers_401(guarded: TestClient) -> None:
    open_ones = set()
    for method, path in routes(guarded):
        response = guarded.request(method, path)
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == 'Bearer realm="dfusion"'
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["code"] == "unauthorized"
        else:
            assert response.status_code == (422 if (method, path) == ("POST", "/sign-in") else 200)
            open_ones.add(path)
    assert open_ones == OPEN
    assert len(routes(guarded)) > 20


@pytest.mark.parametrize("path", ["/nowhere", "/jobs/", "//healthz", "/healthz/", "/healthz%2f..%2fjobs", "/"])
def test_paths_that_lead_nowhere_are_closed_too(guarded: TestClient, path: str) -> None:
    assert guarded.get(f"http://testserver{path}").status_code == 401


def _least_scope(method: str, path: str) -> str:
    """Return the scope that a route requires. Routes that are not listed require only read."""
    if path.startswith(("/api-keys", "/webhook")) or path.endswith("/gold"):
        return "admin"
    if path.endswith(("/verdict", "/answer")):
        return "review"
    if path == "/sign-out":
        return "read"
    if method != "GET":
        return "submit"
    return "read"


@pytest.mark.parametrize("held", [{"read"}, {"submit"}, {"review"}, {"admin"}, {"submit", "review"}])
def test_keys_are_limited_to_their_scopes(guarded: TestClient, held: set[str]) -> None:
    may = ALL_SCOPES if "admin" in held else held | {"read"}
    key = make_key(guarded, *held)["key"]
    for method, path in routes(guarded):
        response = guarded.request(method, path, headers=bearer(key))
        if path == "/rounds/new":  # for browsers only: tests/unit/api/pages/test_new_run.py
            assert response.status_code == 404
        elif path in OPEN or _least_scope(method, path) in may:
            assert response.status_code not in (401, 403), (method, path, response.text)
        else:
            assert (response.status_code, response.json()["code"]) == (403, "forbidden"), (method, path)
            assert "insufficient_scope" in response.headers["www-authenticate"]


def test_a_forbidden_request_is_not_validated(guarded: TestClient) -> None:
    key = make_key(guarded, "read")["key"]
    assert guarded.post("/rounds", json={"surprise": 1}, headers=bearer(key)).status_code == 403


def test_a_route_without_a_scope_keeps_the_service_from_starting(tmp_path: Path) -> None:
    app = application(tmp_path)
    router = APIRouter(prefix="/new")
    router.add_api_route("/forgotten", lambda: None)
    app.include_router(router)
    with pytest.raises(StartError, match="/new/forgotten"), TestClient(app):
        pass


def test_a_mounted_application_keeps_the_service_from_starting(tmp_path: Path) -> None:
    app = application(tmp_path)
    app.mount("/elsewhere", FastAPI())
    with pytest.raises(StartError, match="/elsewhere"), TestClient(app):
        pass


def test_scopes_of_a_router_and_of_its_route_both_count(tmp_path: Path) -> None:
    app = application(tmp_path)
    router = APIRouter(prefix="/new", dependencies=[require_scope("read")])
    router.add_api_route("/thing", lambda: 1, methods=["PUT"], dependencies=[require_scope("review")])
    app.include_router(router)
    with TestClient(app) as client:
        responses = {
            scope: client.put("/new/thing", headers=bearer(make_key(client, scope)["key"])) for scope in ALL_SCOPES
        }
    codes = {scope: response.status_code for scope, response in responses.items()}
    assert codes == {"read": 403, "submit": 403, "review": 200, "admin": 200}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b" ",
        b"Bearer",
        b"Bearer ",
        b"Bearer  ",
        b"bearer",
        ADMIN.encode(),
        b"Basic " + ADMIN.encode(),
        b"Basic YTpi",
        b"Bearer " + ADMIN.encode() + b" x",
        b"Bearer " + ADMIN.encode() + b",",
        b"Bearer " + ADMIN.encode()[:-1],
        b"Bearer " + ADMIN.encode() + b"1",
        b"Bearer " + ADMIN.upper().encode(),
        b"Bearer dfk_",
        b"Bearer dfk_" + b"x" * 100_000,
        b"Bearer \xff\xfe",
        b"Bearer dfk_\xc3\xa9" + b"1" * 40,
        b"Bearer\t" + ADMIN.encode(),
        b"Bearer=" + ADMIN.encode(),
        b"Bearer " + token_hash(ADMIN).encode(),
        b"Bearer ' OR 1=1 --",
        b"Bearer %",
        b'Digest username="x"',
    ],
)
def test_a_malformed_or_unknown_key_is_401(guarded: TestClient, header: bytes) -> None:
    response = guarded.get("/jobs", headers={b"Authorization": header})
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == 'Bearer realm="dfusion", error="invalid_token"'
    assert ADMIN not in response.text


def test_two_keys_at_once_are_401(guarded: TestClient) -> None:
    headers = [("Authorization", f"Bearer {ADMIN}"), ("Authorization", f"Bearer {ADMIN}")]
    assert guarded.get("/jobs", headers=headers).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
def test_the_scheme_is_read_in_any_case(guarded: TestClient, scheme: str) -> None:
    assert guarded.get("/jobs", headers={"Authorization": scheme + ADMIN}).status_code == 200


def test_the_body_of_an_unauthorized_request_is_not_read(guarded: TestClient) -> None:
    response = guarded.post("/rounds", content=b" " * ((1 << 20) + 1), headers={"Content-Type": "application/json"})
    assert response.status_code == 401


def test_jobs_record_their_key_and_keys_do_not_share_idempotency_keys(guarded: TestClient) -> None:
    first, second = make_key(guarded, "submit"), make_key(guarded, "submit")
    same = {"Idempotency-Key": "one"}
    job_ids = [
        guarded.post("/rounds", json=round_body(seed=seed), headers=bearer(key["key"]) | same).json()["id"]
        for key, seed in ((first, 1), (second, 2), (first, 1))
    ]
    assert job_ids[0] == job_ids[2] != job_ids[1]
    service = service_of(guarded)
    assert isinstance(service, Service)
    with service.uow.reading() as session:
        assert [jobs.get(session, job).api_key_id for job in job_ids[:2]] == [first["id"], second["id"]]


@pytest.fixture(scope="module")
def pair_id(guarded: TestClient) -> str:
    """The id of a pair without a verdict."""
    service = service_of(guarded)
    stored = Results.of_new_job(service)
    image = stored.artifact("image")
    samples = [stored.sample(number, image) for number in range(2)]
    pair = stored.pair(1, samples[0].id, samples[1].id, adopted=True)
    with service.uow.writing() as session:
        for rows in ([image], samples, [pair]):
            results.add_all(session, rows)
    return pair.id


def test_the_name_of_a_key_is_the_reviewer_of_its_verdicts(guarded: TestClient, pair_id: str) -> None:
    keys = [make_key(guarded, "review", name=name)["key"] for name in ("ann", "bob")]
    path = f"/pairs/{pair_id}/verdict"
    for key in keys:
        given = guarded.put(path, json={"prefer": "base"}, headers=bearer(key)).json()
    assert [verdict["reviewer"] for verdict in given["verdicts"]] == ["ann", "bob"]
    own = guarded.put(path, json={"prefer": "reject", "reviewer": "ann"}, headers=bearer(keys[0]))
    assert {verdict["reviewer"]: verdict["prefer"] for verdict in own.json()["verdicts"]} == {
        "ann": "reject",
        "bob": "base",
    }
    other = guarded.put(path, json={"prefer": "target", "reviewer": "ann"}, headers=bearer(keys[1]))
    assert (other.status_code, other.json()["errors"][0]["pointer"]) == (422, "/reviewer")
    assert guarded.get(f"/pairs/{pair_id}", headers=bearer(keys[1])).json()["verdict"]["prefer"] == "tie"


def test_only_administrators_know_gold_pairs(guarded: TestClient, pair_id: str) -> None:
    reviewer = bearer(make_key(guarded, "review", "submit", name="eve")["key"])
    plain = guarded.get(f"/pairs/{pair_id}", headers=reviewer).json()
    page = guarded.get(f"/pairs/{pair_id}", headers=bearer(ADMIN) | {"Accept": "text/html"}).text
    assert guarded.put(f"/pairs/{pair_id}/gold", json={"expected": "tie"}, headers=bearer(ADMIN)).status_code == 200
    guarded.put(f"/pairs/{pair_id}/verdict", json={"prefer": "tie"}, headers=reviewer)

    assert guarded.get(f"/pairs/{pair_id}/gold", headers=reviewer).status_code == 403
    assert guarded.get("/pairs?gold=true", headers=reviewer).status_code == 403
    assert guarded.get("/pairs?gold=true", headers=reviewer | {"Accept": "text/html"}).status_code == 403
    shown = guarded.get(f"/pairs/{pair_id}", headers=reviewer).json()
    assert shown.keys() == plain.keys() and "gold" not in shown
    assert guarded.get(f"/pairs/{pair_id}", headers=bearer(ADMIN) | {"Accept": "text/html"}).text.count(
        "gold"
    ) == page.count("gold")  # the source of the page is that of any pair

    def counts_of_eve(headers: dict[str, str]) -> tuple[int | None, int | None]:
        rows = guarded.get("/verdicts/agreement", headers=headers).json()["reviewers"]
        [row] = [row for row in rows if row["reviewer"] == "eve"]
        return row["gold_judged"], row["gold_right"]

    assert counts_of_eve(reviewer) == (None, None)
    assert counts_of_eve(bearer(ADMIN)) == (1, 1)


def test_the_documentation_loads_nothing_from_other_hosts(guarded: TestClient) -> None:
    page = guarded.get("/docs")
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert set(sources) == {path for path in OPEN if path.startswith("/docs/")}
    types = [guarded.get(source).headers["content-type"].partition(";")[0] for source in sorted(sources)]
    assert types == ["image/png", "text/javascript", "text/css"]
    [script] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in page.headers["content-security-policy"]


def test_an_unavailable_database_is_503_and_not_401(guarded: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise OperationalError("select", {}, Exception("away"))

    monkeypatch.setattr(api_keys, "candidates", away)
    response = guarded.get("/jobs", headers=bearer(ADMIN))
    assert (response.status_code, response.json()["code"]) == (503, "database")
    assert response.headers["retry-after"] == "5"


def test_openapi_declares_the_scopes_of_each_operation(guarded: TestClient, local: TestClient) -> None:
    schema = guarded.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    security_by_route = {
        (method.upper(), re.sub(r"\{[^}]*\}", "x", path)): operation.get("security")
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    }
    assert security_by_route["GET", "/jobs"] == [{"apiKey": ["read"]}]
    assert security_by_route["POST", "/jobs/x/cancel"] == [{"apiKey": ["read", "submit"]}]
    assert security_by_route["DELETE", "/api-keys/x"] == [{"apiKey": ["admin"]}]
    assert {path for (_, path), security in security_by_route.items() if security is None} == {"/healthz", "/readyz"}
    assert "securitySchemes" not in local.get("/openapi.json").json()["components"]


def test_without_keys_everyone_on_this_machine_may_do_everything(local: TestClient) -> None:
    for method, path in routes(local):
        response = local.request(method, path, headers=bearer("nonsense"))
        assert response.status_code not in (401, 403), (method, path, response.text)


@pytest.mark.parametrize(
    ("headers", "let_in"),
    [
        ({}, True),
        ({"Host": "localhost:8000"}, True),
        ({"Host": "127.0.0.1:8000"}, True),
        ({"Host": "[::1]:8000"}, True),
        ({"Host": "app.localhost"}, True),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, False),
        ({"Host": "192.168.0.7:8000"}, False),
        ({"Host": "localhost."}, False),
        ({"Host": "[::1"}, False),
        ({"Host": "127.0.0.1:8000", "Origin": "https://evil.example"}, False),
        ({"Host": "127.0.0.1:8000", "Origin": "null"}, False),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:9000"}, False),
    ],
)
def test_without_keys_other_sites_in_a_browser_stay_out(
    local: TestClient, headers: dict[str, str], let_in: bool
) -> None:
    response = local.get("/jobs", headers=headers)
    assert response.status_code == (200 if let_in else 403)
    assert let_in or response.json()["code"] == "not_local"


def test_without_keys_an_address_of_the_network_stays_shut(tmp_path: Path) -> None:
    app = create_app(settings_for(tmp_path / "data", tmp_path / "tiny"))
    with TestClient(app, base_url="http://192.168.0.7:8000", headers={"Host": "localhost"}) as client:
        assert client.get("/jobs").json()["code"] == "not_local"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "", "example.org"])
def test_a_service_without_keys_does_not_start_where_others_could_reach_it(tmp_path: Path, host: str) -> None:
    settings = settings_for(tmp_path / "data", tmp_path / "tiny", host=host)
    with pytest.raises(StartError, match="DFUSION_AUTH"):
        create_app(settings)
    create_app(settings.model_copy(update={"allow_open": True}))
    create_app(settings.model_copy(update={"auth": True}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(tmp_path: Path, host: str) -> None:
    create_app(settings_for(tmp_path / "data", tmp_path / "tiny", host=host))


@pytest.mark.parametrize("is_open", [False, True])
def test_metrics_take_a_key_unless_they_are_open(tmp_path: Path, is_open: bool) -> None:
    with TestClient(application(tmp_path, metrics_open=is_open)) as client:
        assert client.get("/metrics").status_code == (200 if is_open else 401)
        assert client.get("/metrics", headers=bearer(make_key(client, "review")["key"])).status_code == 200


def test_every_route_can_declare_a_scope(guarded: TestClient) -> None:
    kinds = {
        type(context.original_route)
        for context in iter_route_contexts(guarded.app.routes)  # type: ignore[attr-defined]
        if context.path not in OPEN
    }
    assert all(issubclass(kind, APIRoute) for kind in kinds)


def test_an_unknown_scope_is_rejected_at_declaration() -> None:
    with pytest.raises(ValueError, match="reed"):
        require_scope("reed")


def test_an_id_of_another_kind_is_no_key(guarded: TestClient) -> None:
    response = guarded.delete(f"/api-keys/{new_id(IdKind.JOB)}", headers=bearer(ADMIN))
    assert response.status_code == 404
