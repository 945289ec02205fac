"""The pages of human preference tests: what raters see, who may do what, and that texts stay texts."""

import re

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service import preference_tests
from service.db.tables import Job, PreferenceAnswer, PreferenceTest, Sample
from service.preference_tests import NewTest
from tests.drawn_results import draw_evaluation
from tests.statements import statements
from tests.unit.api.pages.conftest import Site
from tests.unit.api.pages.test_negotiation import PROGRAMS
from tests.unit.api.pages.test_security import SCRIPT, csrf_of, make_key, signed_in

PAGES = (
    "/preference-tests",
    "/preference-tests/{test}",
    "/preference-tests/{test}/questions/0?rater=ann",
    "/preference-tests/{test}/results",
)


def new_test(site: Site, name: str | None = "figure 6", prompts: int = 2) -> PreferenceTest:
    drawn = draw_evaluation(site.service, prompts=prompts)
    return preference_tests.create(site.service, NewTest(drawn.job_id, name))


@pytest.fixture(scope="module")
def test(site: Site) -> PreferenceTest:
    return new_test(site)


@pytest.mark.parametrize("path", PAGES)
def test_browsers_get_a_page_and_programs_json(site: Site, test: PreferenceTest, path: str) -> None:
    url = path.format(test=test.id)
    page = site.browser.get(url)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "Accept" in page.headers["vary"]
    for accept in PROGRAMS:
        response = site.client.get(url, headers={"Accept": accept})
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), accept
    assert site.browser.get(f"/preference-tests/{test.id}/results.csv").headers["content-type"].startswith("text/csv")


@pytest.mark.parametrize(("models", "is_offered"), [(1, False), (2, True), (8, True), (9, False)])
def test_only_evaluations_of_two_to_eight_models_are_offered(site: Site, models: int, is_offered: bool) -> None:
    job_id = draw_evaluation(site.service, models=models, prompts=1, seeds=1).job_id
    link = f"/preference-tests?evaluation={job_id}"
    for url in ("/preference-tests", link):
        assert (f'<option value="{job_id}"' in site.browser.get(url).text) == is_offered
    assert (f'href="{link}#new"' in site.browser.get(f"/jobs/{job_id}").text) == is_offered


def test_next_leads_to_a_question_and_at_the_end_to_the_test(site: Site) -> None:
    test = new_test(site)
    path = f"/preference-tests/{test.id}"
    order = preference_tests.question_order(test, "ann")
    response = site.browser.get(f"{path}/next", params={"rater": "ann"})
    assert (response.status_code, response.headers["location"]) == (303, f"{path}/questions/{order[0]}?rater=ann")

    # each question leads to the next one without an answer
    preference_tests.answer(site.service, test.id, order[1], "ann", 1)
    page = site.browser.get(response.headers["location"]).text
    assert f'data-next="{path}/questions/{order[2]}?rater=ann"' in page
    assert f"question 1 of {test.questions}" in page

    for number in order:
        preference_tests.answer(site.service, test.id, number, "ann", None)
    response = site.browser.get(f"{path}/next", params={"rater": "ann"})
    assert response.headers["location"] == f"{path}?rater=ann"
    assert "you have answered all 8 questions" in site.browser.get(response.headers["location"]).text


def test_a_question_is_blind(site: Site, test: PreferenceTest) -> None:
    page = site.browser.get(f"/preference-tests/{test.id}/questions/3?rater=ann").text
    article = page[page.index("<article") : page.index("</article>")]
    assert len(re.findall(r'<img class="picture" src="/images/art_\w+" alt="Image \d"', article)) == 3
    assert not any(text in article for text in (*test.models, "tiny", "smp_", "round"))


def test_pages_run_a_fixed_number_of_statements(site: Site) -> None:
    counts = []
    for prompts in (1, 4):
        test = new_test(site, prompts=prompts)
        for number in range(test.questions):
            preference_tests.answer(site.service, test.id, number, "ann", 1)
        with statements(site.service.uow.engine) as seen:
            for path in PAGES:
                assert site.browser.get(path.format(test=test.id)).status_code == 200
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_a_key_that_only_reads_cannot_answer_and_sees_no_buttons(guarded: Site) -> None:
    test = new_test(guarded)
    path = f"/preference-tests/{test.id}"

    def buttons(browser: TestClient) -> tuple[bool, bool, bool]:
        """Whether the pages offer to answer, to start rating, and to create or delete a test."""
        question = browser.get(f"{path}/questions/0").text
        pages = browser.get(path).text + browser.get("/preference-tests").text
        return 'data-choice="1"' in question, f'href="{path}/next"' in pages, "data-action" in pages

    reader = signed_in(guarded, make_key(guarded, "read", name="reader")["key"])
    assert buttons(reader) == (False, False, False)
    assert 'id="new-test"' not in reader.get("/preference-tests").text
    headers = {"X-CSRF-Token": csrf_of(reader), "Accept": "application/json"}
    for refused in (
        reader.put(f"{path}/questions/0/answer", json={"choice": 1}, headers=headers),
        reader.post("/preference-tests", json={"evaluation": test.job_id}, headers=headers),
        reader.delete(path, headers=headers),
    ):
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")

    rater = signed_in(guarded, make_key(guarded, "review", name="ann")["key"])
    assert buttons(rater) == (True, True, False)
    headers = {"X-CSRF-Token": csrf_of(rater), "Accept": "application/json"}
    assert rater.put(f"{path}/questions/0/answer", json={"choice": 1}, headers=headers).status_code == 200
    assert "Answered by ann: 1 of 8" in rater.get(path).text

    author = signed_in(guarded, make_key(guarded, "submit", name="author")["key"])
    assert buttons(author) == (False, False, True)


def test_stored_scripts_stay_text(guarded: Site) -> None:
    test = new_test(guarded, SCRIPT)
    rater = signed_in(guarded, make_key(guarded, "review", name=SCRIPT)["key"])
    with guarded.service.uow.writing() as session:
        session.execute(update(Job).where(Job.id == test.job_id).values(label=SCRIPT))
        session.execute(update(Sample).where(Sample.job_id == test.job_id).values(prompt=SCRIPT))
        session.add(PreferenceAnswer(test_id=test.id, rater=SCRIPT, question=0, answered_at=1.0))
    for path in PAGES:
        page = rater.get(path.format(test=test.id).partition("?")[0])
        assert page.status_code == 200
        assert "<script>" not in page.text and "&lt;script&gt;" in page.text, path
