"""Which requests get a page, and that all others get what they got before."""

import re

import pytest

from api.pages.routes import page_paths
from tests.unit.api.pages.conftest import BROWSER, Site

PAGES = (
    "/jobs",
    "/jobs/{job}",
    "/jobs/{job}/stages",
    "/pairs",
    "/pairs/{pair}",
    "/samples",
    "/samples/{sample}",
    "/models",
    "/models/{model}",
    "/verdicts/agreement",
)
PROGRAMS = ("*/*", "application/json", "application/json, text/html", "application/json, text/plain, */*", "")


def address(site: Site, path: str) -> str:
    pair = site.client.get(f"/pairs/{site.run.pairs[0]}").json()
    return path.format(job=site.run.job_id, pair=pair["id"], sample=pair["target"]["id"], model=site.run.model_id)


def test_every_address_with_a_page_and_json_is_tested(site: Site) -> None:
    """Those of preference tests are in test_preference_tests.py."""
    patterns = page_paths()
    document = site.client.get("/openapi.json").json()
    both = {
        re.sub(r"{\w+}", "{}", path)
        for path, operations in document["paths"].items()
        if "get" in operations and any(pattern.match(path) for pattern in patterns)
    }
    tested = {re.sub(r"{\w+}", "{}", path) for path in PAGES}
    assert {path for path in both if not path.startswith("/preference-tests")} == tested


@pytest.mark.parametrize("path", PAGES)
def test_browsers_get_a_page_and_programs_the_same_json(site: Site, path: str) -> None:
    url = address(site, path)
    page = site.client.get(url, headers={"Accept": BROWSER})
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "Accept" in page.headers["vary"]

    bodies = set()
    for accept in PROGRAMS:
        response = site.client.get(url, headers={"Accept": accept})
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), accept
        assert response.headers["vary"] == "Accept"
        bodies.add(response.content)
    assert len(bodies) == 1


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        ("text/html", True),
        ("text/html;q=0.9, application/json;q=0.8", True),
        ("text/html;q=0.8, application/json;q=0.9", False),
        ("text/html, application/json", False),
        ("text/html;q=0", False),
        ("text/html;q=x", False),
        ("text/*", False),
        ("TEXT/HTML", True),
    ],
)
def test_weights_decide(site: Site, accept: str, is_page: bool) -> None:
    response = site.client.get("/jobs", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/html") is is_page


def test_the_first_page_exists_for_browsers_only(site: Site) -> None:
    assert site.browser.get("/").status_code == 200
    problem = site.client.get("/")
    assert (problem.status_code, problem.json()["code"]) == (404, "not_found")


def test_changes_keep_their_routes(site: Site) -> None:
    answer = site.client.put(f"/pairs/{site.run.pairs[0]}/verdict", json={"prefer": None}, headers={"Accept": BROWSER})
    assert answer.headers["content-type"] == "application/json"
    assert site.client.post("/pairs", headers={"Accept": BROWSER}).headers["allow"] == "GET, HEAD"


def test_head_of_a_page_has_its_headers(site: Site) -> None:
    head = site.browser.head("/jobs")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/pairs/pair_x", 404), ("/jobs?limit=x", 422)])
def test_errors_are_pages_for_browsers(site: Site, path: str, status: int) -> None:
    page = site.browser.get(path)
    assert page.status_code == status
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert f'<p class="code">{status}</p>' in page.text
    assert site.client.get(path).headers["content-type"] == "application/problem+json"


def test_empty_fields_of_a_form_are_no_filters(site: Site) -> None:
    assert site.browser.get("/pairs?job=&round=&adopted=&judged=").status_code == 200
    assert site.browser.get("/jobs?kind=&state=").status_code == 200
