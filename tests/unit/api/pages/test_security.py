"""Signing in, forged requests, scopes, escaping and the Content-Security-Policy."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service.db.clock import now_seconds
from service.db.tables import ApiKey, BrowserSession, Job, Pair, Sample
from tests.unit.api.pages.conftest import ADMIN, BROWSER, Site

SCRIPT = "<script>alert('stored')</script>"
PAGES = (
    "/",
    "/jobs/{job}",
    "/jobs/{job}/stages",
    "/pairs",
    "/pairs/{pair}",
    "/pairs/{pair}/compare/{pair}",
    "/samples",
    "/samples/{sample}",
    "/models",
    "/models/{model}",
    "/rounds/new?clone={job}",
    "/jobs/{job}/report",
    "/jobs/compare?run={job}&run={job}",
    "/nowhere/{script}",
)


def make_key(site: Site, *scopes: str, name: str = "ann") -> dict[str, Any]:
    body = {"name": name, "scopes": scopes}
    response = site.client.post("/api-keys", json=body, headers={"Authorization": f"Bearer {ADMIN}"})
    return dict(response.json())


def signed_in(site: Site, key: str) -> TestClient:
    browser = TestClient(
        site.client.app, base_url="http://127.0.0.1", follow_redirects=False, headers={"Accept": BROWSER}
    )
    response = browser.post("/sign-in", data={"key": key, "next": "/pairs"})
    assert (response.status_code, response.headers["location"]) == (303, "/pairs")
    return browser


def csrf_of(browser: TestClient) -> str:
    match = re.search(
        r'<meta name="csrf-token" content="([0-9a-f]{64})">', browser.get("/", headers={"Accept": BROWSER}).text
    )
    assert match is not None
    return match[1]


@pytest.fixture
def reviewer(guarded: Site) -> Iterator[TestClient]:
    yield signed_in(guarded, make_key(guarded, "review")["key"])


def test_a_browser_without_a_session_is_led_to_the_sign_in_and_back(guarded: Site) -> None:
    response = guarded.browser.get("/pairs?judged=false")
    assert (response.status_code, response.headers["location"]) == (303, "/sign-in?next=%2Fpairs%3Fjudged%3Dfalse")
    page = guarded.browser.get(response.headers["location"])
    assert page.status_code == 200
    assert 'name="next" value="/pairs?judged=false"' in page.text
    assert guarded.client.get("/pairs").status_code == 401


def test_the_cookie_cannot_be_read_by_scripts_or_sent_by_other_sites(guarded: Site) -> None:
    response = guarded.browser.post("/sign-in", data={"key": ADMIN})
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
    assert ADMIN not in cookie
    https = TestClient(guarded.client.app, base_url="https://127.0.0.1", follow_redirects=False)
    assert "Secure" in https.post("/sign-in", data={"key": ADMIN}).headers["set-cookie"]


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_the_sign_in_leads_to_no_other_site(guarded: Site, target: str) -> None:
    response = guarded.browser.post("/sign-in", data={"key": ADMIN, "next": target})
    assert response.headers["location"] == "/"


def test_a_wrong_key_starts_no_session(guarded: Site) -> None:
    response = guarded.browser.post("/sign-in", data={"key": "dfk_" + "x" * 40})
    assert response.status_code == 422
    assert "set-cookie" not in response.headers
    assert "unknown, expired or revoked" in response.text


def test_images_load_with_the_session(guarded: Site, reviewer: TestClient) -> None:
    pair = reviewer.get(f"/pairs/{guarded.run.pairs[0]}", headers={"Accept": "application/json"}).json()
    image = pair["base"]["image"].replace("/artifacts/", "/images/")
    assert reviewer.get(image).headers["content-type"] == "image/png"
    assert reviewer.get(pair["base"]["image"]).status_code == 200
    assert guarded.client.get(image).status_code == 401


def test_a_session_ends_with_its_key(guarded: Site) -> None:
    key = make_key(guarded, "read")
    browser = signed_in(guarded, key["key"])
    assert browser.get("/pairs").status_code == 200
    guarded.client.delete(f"/api-keys/{key['id']}", headers={"Authorization": f"Bearer {ADMIN}"})
    assert browser.get("/pairs").status_code == 303


@pytest.mark.parametrize("table", [ApiKey, BrowserSession])
def test_a_session_ends_when_it_or_its_key_expires(guarded: Site, table: Any) -> None:
    key = make_key(guarded, "read")
    browser = signed_in(guarded, key["key"])
    column = table.id if table is ApiKey else table.api_key_id
    with guarded.service.uow.writing() as session:
        session.execute(update(table).where(column == key["id"]).values(expires_at=now_seconds() - 1))
    assert browser.get("/pairs").status_code == 303


def test_signing_out_ends_the_session_in_the_service(guarded: Site, reviewer: TestClient) -> None:
    token = reviewer.cookies["dfusion_session"]
    assert reviewer.post("/sign-out", data={"csrf": "0" * 64}).status_code == 403
    assert reviewer.get("/pairs").status_code == 200
    response = reviewer.post("/sign-out", data={"csrf": csrf_of(reviewer)})
    assert response.headers["location"] == "/sign-in"
    assert guarded.browser.get("/pairs", headers={"Cookie": f"dfusion_session={token}"}).status_code == 303


def test_a_session_is_stored_as_a_hash(guarded: Site, reviewer: TestClient) -> None:
    with guarded.service.uow.reading() as session:
        hashes = set(session.query(BrowserSession.sha256))
    assert all(reviewer.cookies["dfusion_session"] not in row for row in hashes)


def test_a_change_needs_the_token_of_the_page(guarded: Site, reviewer: TestClient) -> None:
    url = f"/pairs/{guarded.run.pairs[0]}/verdict"
    body = {"prefer": "tie"}
    reviewer.headers["Accept"] = "application/json"
    refused = reviewer.put(url, json=body)
    assert (refused.status_code, refused.json()["code"]) == (403, "csrf")
    other = signed_in(guarded, ADMIN)
    assert reviewer.put(url, json=body, headers={"X-CSRF-Token": csrf_of(other)}).status_code == 403

    stored = reviewer.put(url, json=body, headers={"X-CSRF-Token": csrf_of(reviewer)})
    assert stored.status_code == 200
    assert stored.json()["verdict"]["reviewer"] == "ann"


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
@pytest.mark.parametrize("path", ["/sign-in", "/sign-out", "/rounds/new", "/jobs/x/cancel"])
def test_changes_from_other_sites_are_refused(guarded: Site, path: str, headers: dict[str, str]) -> None:
    response = guarded.client.post(path, headers={"Authorization": f"Bearer {ADMIN}", **headers})
    assert (response.status_code, response.json()["code"]) == (403, "cross_site")


def test_a_key_that_only_reads_sees_no_verdicts_and_no_actions(guarded: Site) -> None:
    browser = signed_in(guarded, make_key(guarded, "read")["key"])
    page = browser.get(f"/pairs/{guarded.run.pairs[0]}").text
    assert 'data-judging="false"' in page
    assert 'data-side="left"' not in page and "Review unjudged pairs" not in browser.get("/pairs").text
    assert "data-action" not in browser.get(f"/jobs/{guarded.run.job_id}").text

    headers = {"X-CSRF-Token": csrf_of(browser), "Accept": "application/json"}
    verdict = browser.put(f"/pairs/{guarded.run.pairs[0]}/verdict", json={"prefer": "tie"}, headers=headers)
    assert (verdict.status_code, verdict.json()["code"]) == (403, "forbidden")
    assert browser.post(f"/jobs/{guarded.run.job_id}/cancel", headers=headers).status_code == 403

    assert "Show denoising steps" not in page and "Fuse again" not in page
    assert "Try a prompt" not in browser.get(f"/models/{guarded.run.model_id}").text
    preview = browser.post("/previews", json={"pair": guarded.run.pairs[0]}, headers=headers)
    assert (preview.status_code, preview.json()["code"]) == (403, "forbidden")


def test_a_reviewer_sees_verdicts_and_no_actions(guarded: Site, reviewer: TestClient) -> None:
    assert 'data-side="left"' in reviewer.get(f"/pairs/{guarded.run.pairs[0]}").text
    assert "data-action" not in reviewer.get(f"/jobs/{guarded.run.job_id}").text


def test_stored_scripts_stay_text_on_every_page(site: Site) -> None:
    with site.service.uow.writing() as session:
        session.execute(update(Job).values(label=SCRIPT, error_code="x", error_message=SCRIPT))
        session.execute(update(Sample).values(prompt=SCRIPT))
        session.execute(
            update(Pair).values(prompt=SCRIPT, reason=SCRIPT, verdict="tie", verdict_by=SCRIPT, verdict_at=1.0)
        )

    pair = site.client.get(f"/pairs/{site.run.pairs[0]}").json()
    ids = {"job": site.run.job_id, "pair": pair["id"], "sample": pair["target"]["id"], "model": site.run.model_id}
    shown = 0
    for path in PAGES:
        page = site.browser.get(path.format(**ids, script="%3Cscript%3Ealert('stored')%3C/script%3E"))
        assert "<script>" not in page.text, path
        shown += "&lt;script&gt;" in page.text
    assert shown == len(PAGES) - 2  # all but the model and the error page


@pytest.mark.parametrize("path", ["/", "/pairs", "/rounds/new", "/nowhere"])
def test_pages_allow_no_inline_script_or_style(site: Site, path: str) -> None:
    page = site.browser.get(path)
    policy = page.headers["content-security-policy"]
    assert policy == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page.text)
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page.text)
