"""Preference tests in Chromium: answers by keyboard, undo, lost connections, and the form for a new test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from service import preference_tests
from service.db.tables import PreferenceTest
from service.preference_tests import NewTest
from tests.drawn_results import draw_evaluation
from tests.unit.api.pages.browser import Live, expect, live, stored, watched_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("rating")) as site:
        yield site


@pytest.fixture
def page(chromium: Any, site: Live) -> Iterator[Any]:
    """A page in a browser without history. The test fails if it reports an error."""
    with watched_page(chromium, site.url, "ERR_INTERNET_DISCONNECTED") as opened:
        yield opened


@pytest.fixture
def test(site: Live) -> PreferenceTest:
    """A preference test with ten questions about three models."""
    drawn = draw_evaluation(site.service, prompts=5, seeds=1)
    return preference_tests.create(site.service, NewTest(drawn.job_id, "figure 6"))


def answers(site: Live, test: PreferenceTest) -> dict[int, int | str | None]:
    """The answers of ann, by question."""
    path = f"/preference-tests/{test.id}/questions"
    return {number: site.get(f"{path}/{number}", rater="ann")["choice"] for number in range(test.questions)}


def test_ten_questions_are_answered_by_keys_only(site: Live, test: PreferenceTest, page: Any) -> None:
    page.goto(f"/preference-tests/{test.id}")
    page.get_by_label("Your name").fill("ann")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_visible()
    page.wait_for_load_state("networkidle")
    order = preference_tests.question_order(test, "ann")
    keys = ["1", "2", "3", "0", "=", "1", "1", "2", "3", "3"]
    for number, key in zip(order, keys, strict=True):
        expect(page.locator("#question")).to_have_attribute(
            "data-answer", f"/preference-tests/{test.id}/questions/{number}/answer"
        )
        page.keyboard.press("9")  # no image has this number
        page.keyboard.press(key)
    expect(page.locator("main")).to_contain_text("you have answered all 10 questions")
    chosen = ["none" if key in "0=" else int(key) for key in keys]
    assert answers(site, test) == dict(zip(order, chosen, strict=True))


@pytest.mark.long
def test_answers_can_be_undone_and_questions_skipped(site: Live, test: PreferenceTest, page: Any) -> None:
    order = preference_tests.question_order(test, "ann")
    page.goto(f"/preference-tests/{test.id}/next?rater=ann")
    page.wait_for_load_state("networkidle")
    question = page.locator("#question")
    page.keyboard.press("2")
    expect(question).to_have_attribute("data-answer", re.compile(f"/{order[1]}/answer$"))
    page.keyboard.press("u")
    expect(question).to_have_attribute("data-answer", re.compile(f"/{order[0]}/answer$"))
    expect(page.locator("#answer-note")).to_have_text("The answer is removed.")
    stored(page)
    assert set(answers(site, test).values()) == {None}

    # no undo before the next question is shown: the answer that it removed would be out of sight
    page.evaluate("for (const key of '2u') document.dispatchEvent(new KeyboardEvent('keydown', { key }))")
    expect(question).to_have_attribute("data-answer", re.compile(f"/{order[1]}/answer$"))
    stored(page)
    assert answers(site, test)[order[0]] == 2
    page.keyboard.press("u")
    expect(question).to_have_attribute("data-answer", re.compile(f"/{order[0]}/answer$"))

    page.keyboard.press("n")
    for number in order[1:]:
        expect(question).to_have_attribute("data-answer", re.compile(f"/{number}/answer$"))
        page.keyboard.press("1")
    expect(question).to_have_attribute("data-answer", re.compile(f"/{order[0]}/answer$"))  # which was skipped
    page.get_by_role("button", name="None is better than all others").click()
    expect(page.locator("main")).to_contain_text("you have answered all 10 questions")


@pytest.mark.long
def test_a_lost_connection_loses_no_answer(site: Live, test: PreferenceTest, page: Any) -> None:
    page.goto(f"/preference-tests/{test.id}/next?rater=ann")
    page.wait_for_load_state("networkidle")
    page.context.set_offline(True)
    page.keyboard.press("1")
    page.keyboard.press("3")
    expect(page.locator("#outbox")).to_have_text("The service cannot be reached: 2 answers are kept in this browser")
    assert site.get(f"/preference-tests/{test.id}")["answers"] == 0
    page.context.set_offline(False)
    stored(page)
    expect(page.locator("#outbox")).to_be_hidden()
    order = preference_tests.question_order(test, "ann")
    assert [answers(site, test)[number] for number in order[:3]] == [1, 3, None]


@pytest.mark.long
def test_a_test_is_created_from_its_evaluation_and_deleted(site: Live, page: Any) -> None:
    page.goto(f"/jobs/{draw_evaluation(site.service).job_id}")
    page.get_by_role("link", name="Preference test", exact=True).click()
    page.get_by_label("Name").fill("from the form")
    page.get_by_label("Questions").fill("3")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("h1")).to_have_text("from the form")
    page.get_by_role("link", name="Results").click()
    expect(page.locator("main")).to_contain_text("0 answers of 0 raters to 3 questions")
    page.go_back()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("h1")).to_have_text("Preference tests")
    assert "from the form" not in page.content()


@pytest.mark.long
def test_preference_tests_fit_on_a_phone(site: Live, test: PreferenceTest, page: Any) -> None:
    preference_tests.answer(site.service, test.id, 0, "ann", 1)
    page.set_viewport_size({"width": 390, "height": 800})
    for path in ("", f"/{test.id}", f"/{test.id}/questions/0?rater=ann", f"/{test.id}/results"):
        page.goto(f"/preference-tests{path}")
        assert page.evaluate("document.documentElement.scrollWidth") == 390, path
