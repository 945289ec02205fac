"""axe-core finds no serious violation on any page, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service import preference_tests
from service.db.tables import PreferenceTest
from service.preference_tests import NewTest
from tests.drawn_results import DrawnRun, draw_evaluation, draw_run
from tests.unit.api.pages.browser import Live, live, watched_page

axe = pytest.importorskip("axe_playwright_python", reason="axe-core is missing: pip install axe-playwright-python")
pytestmark = pytest.mark.slow
SOURCE = (Path(axe.__file__).parent / "axe.min.js").read_text("utf-8")
SERIOUS = ("serious", "critical")
PAGES = (
    "/",
    "/jobs?state=failed",
    "/rounds/new",
    "/rounds/new?clone={job}",
    "/jobs/compare?run={job}&run={job}",
    "/jobs/{job}",
    "/jobs/{job}/stages",
    "/jobs/{job}/report",
    "/pairs",
    "/pairs/{pair}",
    "/pairs/{pair}/compare/{pair}",
    "/samples",
    "/samples/{sample}",
    "/models",
    "/models/{model}",
    "/preference-tests",
    "/preference-tests/{test}",
    "/preference-tests/{test}/questions/0?rater=ann",
    "/preference-tests/{test}/results",
    "/nowhere",
)
SHORT = (("/", "dark"), ("/rounds/new", "light"), ("/jobs/{job}", "light"), ("/pairs/{pair}", "light"))
"""Those that are not only in the long form."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("axe")) as site:
        yield site


@pytest.fixture(scope="module")
def run(site: Live) -> DrawnRun:
    return draw_run(site.service)


@pytest.fixture(scope="module")
def test(site: Live) -> PreferenceTest:
    """A preference test with an answer."""
    created = preference_tests.create(site.service, NewTest(draw_evaluation(site.service).job_id, "figure 6"))
    preference_tests.answer(site.service, created.id, 0, "ann", 1)
    return created


@pytest.fixture(scope="module")
def page(chromium: Any, site: Live) -> Iterator[Any]:
    with watched_page(chromium, site.url, "404") as opened:
        yield opened


def violations(page: Any) -> list[str]:
    """The serious violations on the page, with the elements that have them."""
    page.evaluate(SOURCE)
    result = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    serious = [violation for violation in result["violations"] if violation["impact"] in SERIOUS]
    return [f"{v['id']}: {v['help']}: {[node['html'] for node in v['nodes'][:3]]}" for v in serious]


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        pytest.param(path, scheme, marks=() if (path, scheme) in SHORT else pytest.mark.long)
        for path in PAGES
        for scheme in ("light", "dark")
    ],
)
def test_no_page_has_a_serious_violation(
    site: Live, run: DrawnRun, test: PreferenceTest, page: Any, path: str, scheme: str
) -> None:
    sample = site.get(f"/pairs/{run.pairs[0]}")["target"]["id"]
    address = path.format(job=run.job_id, pair=run.pairs[0], sample=sample, model=run.model_id, test=test.id)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto(address)
    page.wait_for_load_state("networkidle")
    for group in page.locator("details").all():
        group.evaluate("element => { element.open = true; }")
    assert violations(page) == []


def test_a_serious_violation_is_found(page: Any) -> None:
    page.set_content("<html lang=en><title>x</title><main><h1>x</h1><input></main></html>")
    assert [text.partition(":")[0] for text in violations(page)] == ["label"]
