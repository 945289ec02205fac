"""The pages in Chromium: review by keyboard, lost connections, two reviewers, live runs, and signing in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update

from service import keys
from service.db.tables import Job, Pair
from service.jobs.kinds import RoundSpec
from service.service import cancel_job, create_job, give_verdict
from service.states import KeyScope, Verdict
from tests.drawn_results import DrawnRun, draw_run
from tests.service import round_body
from tests.unit.api.pages.browser import Live, expect, live, stored, watched_page
from tests.unit.api.pages.conftest import ADMIN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("browser")) as site:
        yield site


@pytest.fixture
def run(site: Live) -> DrawnRun:
    """A run that no other test judges."""
    return draw_run(site.service, pairs=4, rounds=1)


@pytest.fixture
def page(chromium: Any, site: Live) -> Iterator[Any]:
    """A page in a browser without history. The test fails if it reports an error."""
    with watched_page(chromium, site.url, "ERR_INTERNET_DISCONNECTED", "412") as opened:
        yield opened


def verdicts(site: Live, run: DrawnRun) -> list[str | None]:
    pairs = site.get("/pairs", job=run.job_id, limit="200")["data"]
    return [pair["verdict"] and pair["verdict"]["prefer"] for pair in pairs]


def expect_pair(page: Any, pair_id: str) -> None:
    """Wait until the page shows this pair and takes keys: its script has arranged the sides."""
    expect(page.locator("#pair")).to_have_attribute("data-pair", pair_id)
    expect(page.locator("#pair .side[data-place=left]")).to_be_visible()


def side_of(page: Any, place: str) -> str:
    return str(page.locator(f"#pair .side[data-place={place}]").get_attribute("data-role"))


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.long)])
def test_pairs_are_judged_by_keys_only(site: Live, page: Any, count: int) -> None:
    run = draw_run(site.service, pairs=count, rounds=1)
    page.goto(f"/pairs?job={run.job_id}&judged=false")
    page.get_by_role("link", name="Review unjudged pairs").press("Enter")
    pair = page.locator("#pair")
    judged: list[str] = []
    for pair_id, key in zip(run.pairs, cycle(["ArrowLeft", "ArrowRight", "t", "x"]), strict=False):
        expect_pair(page, pair_id)
        expect(pair).to_have_attribute("data-blind", "true")
        judged.append({"t": "tie", "x": "reject"}.get(key) or side_of(page, key.removeprefix("Arrow").lower()))
        page.keyboard.press(key)
    expect(page.locator("#toast")).to_contain_text("last pair of the queue")
    stored(page)
    assert verdicts(site, run) == judged

    page.keyboard.press("u")
    page.keyboard.press("u")
    expect(pair).to_have_attribute("data-pair", run.pairs[-2])
    stored(page)
    assert verdicts(site, run) == [*judged[:-2], None, None]


def test_a_blind_pair_names_no_side_and_shows_no_score(run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[0]}")
    shown = page.locator("#pair").inner_text()
    assert not re.search(r"target|reference|adopted|0\.42|0\.5", shown.lower())
    assert {
        page.locator(f".side[data-place={place}] .picture").get_attribute("alt") for place in ("left", "right")
    } == {
        "Image A",
        "Image B",
    }
    page.keyboard.press("b")
    assert "Target" in page.locator("#pair").inner_text()
    assert [side_of(page, place) for place in ("left", "right", "extra")] == ["base", "target", "reference"]


def test_sides_are_random_but_stay_for_a_reviewer(site: Live, page: Any) -> None:
    """Of 24 pairs, all have the same side on the left once in eight million times."""
    many = draw_run(site.service, pairs=24, rounds=1)
    first: list[str] = []
    for pair_id in many.pairs:
        page.goto(f"/pairs/{pair_id}")
        first.append(side_of(page, "left"))
        if len(set(first)) == 2:
            break
    assert set(first) == {"base", "target"}
    page.goto(f"/pairs/{many.pairs[0]}")
    assert side_of(page, "left") == first[0]


def test_images_are_compared_by_slider_flicker_and_mask(run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[0]}")
    page.keyboard.press("b")
    page.keyboard.press("m")
    expect(page.locator(".overlay")).to_be_visible()
    page.keyboard.press("2")
    cut = page.get_by_label("Where the two images meet")
    cut.fill("20")
    left = page.locator(".side[data-place=left] .frame")
    assert left.evaluate("element => getComputedStyle(element).clipPath") == "inset(0px 80% 0px 0px)"
    page.keyboard.press("3")
    expect(page.locator(".side[data-place=right]")).to_be_hidden()
    expect(page.locator(".side[data-place=left]")).to_be_hidden()
    expect(page.locator(".side[data-place=left]")).to_be_visible()


def test_the_next_pair_needs_no_request(run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[0]}?job={run.job_id}")
    page.wait_for_load_state("networkidle")
    page.context.set_offline(True)
    page.keyboard.press("n")
    expect(page.locator("#pair")).to_have_attribute("data-pair", run.pairs[1])
    assert page.evaluate("[...document.querySelectorAll('.picture')].every(image => image.naturalWidth > 0)")


def test_a_lost_connection_loses_no_verdict(site: Live, run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[0]}?job={run.job_id}")
    page.wait_for_load_state("networkidle")
    page.context.set_offline(True)
    page.keyboard.press("t")
    page.keyboard.press("x")
    expect(page.locator("#outbox")).to_have_text("The service cannot be reached: 2 verdicts are kept in this browser")
    assert verdicts(site, run) == [None] * 4

    page.context.set_offline(False)
    stored(page)
    expect(page.locator("#outbox")).to_be_hidden()
    assert verdicts(site, run) == ["tie", "reject", None, None]


def test_verdicts_that_were_kept_are_sent_by_the_next_page(site: Live, run: DrawnRun, page: Any) -> None:
    page.goto("/")
    entry = f'[{{"id": "1", "pair": "{run.pairs[0]}", "prefer": "tie", "revision": 0, "reviewer": null}}]'
    page.evaluate("entry => localStorage.setItem('dfusion.outbox:', entry)", entry)
    page.goto("/pairs")
    stored(page)
    assert verdicts(site, run)[0] == "tie"


def test_a_verdict_whose_reply_was_lost_is_not_a_conflict(site: Live, run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[0]}")
    give_verdict(site.service, run.pairs[0], Verdict.TIE, None, 0)
    page.keyboard.press("t")
    stored(page)
    expect(page.locator("#conflict")).to_be_hidden()
    expect(page.locator("#outbox")).to_be_hidden()


def test_a_verdict_from_another_page_is_not_overwritten_unnoticed(site: Live, run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[3]}?job={run.job_id}")
    give_verdict(site.service, run.pairs[3], Verdict.BASE, None, None)
    page.keyboard.press("x")
    conflict = page.locator("#conflict")
    expect(conflict).to_contain_text("your verdict “base” was stored from another page. “reject” is not stored.")
    assert verdicts(site, run)[3] == "base"
    conflict.get_by_role("button", name="Store “reject”").click()
    stored(page)
    assert verdicts(site, run)[3] == "reject"


@pytest.mark.long
def test_two_verdicts_that_waited_pass_one_of_another_reviewer(site: Live, run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[3]}?job={run.job_id}")
    page.wait_for_load_state("networkidle")
    page.context.set_offline(True)
    page.keyboard.press("t")
    page.keyboard.press("x")
    give_verdict(site.service, run.pairs[3], Verdict.BASE, "bob", None)
    page.context.set_offline(False)
    stored(page)
    pair = site.get(f"/pairs/{run.pairs[3]}")
    assert [(verdict["reviewer"], verdict["prefer"]) for verdict in pair["verdicts"]] == [
        ("bob", "base"),
        (None, "reject"),
    ]
    expect(page.locator("#conflict")).to_be_hidden()


def signed_in(chromium: Any, site: Live, key: str) -> Any:
    """A page of a separate browser, signed in with this key."""
    page = chromium.new_context(base_url=site.url).new_page()
    page.goto("/sign-in")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    page.wait_for_url(site.url + "/")
    return page


def test_two_reviewers_judge_the_same_pairs_at_once(chromium: Any, tmp_path: Path) -> None:
    """They agree on two pairs of three and differ on one, which both judged before the other's verdict was there.

    Of n = 6 verdicts, 3 are ties and 3 reject, and n D_o = 2: alpha = 1 - 5 * 2 / (36 - 9 - 9) = 0.444.
    """
    with live(tmp_path, auth=True, bootstrap_admin_key=SecretStr(ADMIN)) as site:
        run = draw_run(site.service, pairs=3, rounds=1)
        with site.service.uow.writing() as session:
            tokens = [keys.create(session, name, frozenset({KeyScope.REVIEW}), None)[1] for name in ("ann", "bob")]
        ann, bob = (signed_in(chromium, site, token) for token in tokens)
        for page in (ann, bob):
            page.goto(f"/pairs?job={run.job_id}")
            page.get_by_role("link", name="Review unjudged pairs").click()
            expect(page.locator("#pair")).to_have_attribute("data-pair", run.pairs[0])
        for number, (of_ann, of_bob) in enumerate((("t", "x"), ("t", "t"), ("x", "x"))):
            for page, key in ((ann, of_ann), (bob, of_bob)):
                expect_pair(page, run.pairs[number])
                expect(page.locator("#pair")).to_have_attribute("data-blind", "true")
                page.keyboard.press(key)
        for page in (ann, bob):
            expect(page.locator("#toast")).to_contain_text("last pair of the queue")
            stored(page)

        pairs = site.get("/pairs", job=run.job_id, limit="200")["data"]
        given = [{verdict["reviewer"]: verdict["prefer"] for verdict in pair["verdicts"]} for pair in pairs]
        assert given == [
            {"ann": "tie", "bob": "reject"},
            {"ann": "tie", "bob": "tie"},
            {"ann": "reject", "bob": "reject"},
        ]
        bob.goto(f"/pairs?job={run.job_id}&judged_by_me=false")
        expect(bob.locator(".empty")).to_contain_text("You have judged every pair")
        expect(bob.locator("#agreement summary")).to_contain_text("= 0.444 on 3 pairs")
        bob.locator("#agreement summary").click()
        expect(bob.locator("#agreement tbody th")).to_have_text(["ann", "bob"])
        for page in (ann, bob):
            page.context.close()


def test_a_gold_pair_is_marked_on_its_page(site: Live, run: DrawnRun, page: Any) -> None:
    page.goto(f"/pairs/{run.pairs[1]}")
    page.keyboard.press("b")
    page.locator("#gold summary").click()
    page.get_by_label("Expected verdict").select_option("base")
    expect(page.locator("#toast")).to_have_text("Gold pair: “base” is expected.")
    assert site.get(f"/pairs/{run.pairs[1]}/gold")["expected"] == "base"
    page.reload()
    page.locator("#gold summary").click()
    expect(page.get_by_label("Expected verdict")).to_have_value("base")


@pytest.mark.long
def test_without_keys_a_page_shows_the_verdicts_of_the_entered_name(site: Live, run: DrawnRun, page: Any) -> None:
    give_verdict(site.service, run.pairs[0], Verdict.BASE, "bo b/é", None)
    page.goto(f"/pairs/{run.pairs[0]}?job={run.job_id}")
    expect(page.locator("#pair")).to_have_attribute("data-blind", "true")
    page.keyboard.press("?")
    page.get_by_label("Your name, stored with your verdicts").fill("bo b/é")
    page.keyboard.press("Tab")
    expect(page.locator("#verdict-note")).to_have_text("Your verdict: base")
    expect(page.locator("#pair")).to_have_attribute("data-blind", "false")
    page.goto(f"/pairs?job={run.job_id}")
    page.get_by_role("link", name="Review unjudged pairs").click()
    expect(page.locator("#pair")).to_have_attribute("data-pair", run.pairs[1])


def test_a_running_run_is_followed_without_a_reload(site: Live, page: Any) -> None:
    job_id = create_job(site.service, RoundSpec.model_validate(round_body(label="followed")))
    page.goto(f"/jobs/{job_id}")
    expect(page.locator("#live-state")).to_have_text("live")
    page.evaluate("window.isSamePage = true")
    cancel_job(site.service, job_id)
    expect(page.locator("h1 .state")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Retry as a new run")).to_be_visible()
    assert page.evaluate("window.isSamePage")


def test_a_waiting_run_leads_to_the_pairs_that_it_waits_for(site: Live, page: Any) -> None:
    """Two of four pairs are in the sample; one of them is judged."""
    run = draw_run(site.service, pairs=4, rounds=1, review="sample", review_pairs=2)
    with site.service.uow.writing() as session:
        session.execute(update(Pair).where(Pair.id.in_(run.pairs[1:3])).values(review_exempt=True))
        session.execute(update(Job).where(Job.id == run.job_id).values(state="waiting", finished_at=None))
    give_verdict(site.service, run.pairs[0], Verdict.BASE, "ann", None)
    with site.service.uow.writing() as session:  # no stage is left, of which the verdict would have ended the review
        session.execute(update(Job).where(Job.id == run.job_id).values(state="waiting"))

    page.goto(f"/jobs/{run.job_id}")
    expect(page.locator(".banner.warn")).to_have_text(
        "This run waits for verdicts on round 1: 1 of 2 pairs judged. It continues after the last one."
    )
    page.get_by_role("link", name="Review pairs").click()
    page.get_by_role("link", name="Review unjudged pairs").click()
    for pair_id in (run.pairs[0], run.pairs[3]):
        expect_pair(page, pair_id)
        page.keyboard.press("t")
    expect(page.locator("#toast")).to_contain_text("last pair of the queue")
    stored(page)


def test_buttons_change_a_run(site: Live, page: Any) -> None:
    job_id = create_job(site.service, RoundSpec.model_validate(round_body()))
    page.goto(f"/jobs/{job_id}")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("h1 .state")).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("h1 .state")).to_have_text("queued")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 .state")).to_have_text("cancelled")
    assert site.get(f"/jobs/{job_id}")["state"] == "cancelled"


def test_charts_have_axes_and_units(run: DrawnRun, page: Any) -> None:
    page.goto(f"/jobs/{run.job_id}")
    titles = page.locator(".chart figcaption")
    expect(titles).to_have_text(
        [
            "Score: brightness (the reward)",
            "Loss",
            "Log-ratio of both sides",
            "KL divergence from the policy before",
            "Largest ratio",
            "Gradient norm",
        ]
    )
    expect(page.locator(".chart").first.locator("text.axis")).to_have_text(["images used for training", "brightness"])


def test_a_browser_signs_in_and_out(chromium: Any, tmp_path: Path) -> None:
    with live(tmp_path, auth=True, bootstrap_admin_key=SecretStr(ADMIN)) as site:
        [first, *_] = draw_run(site.service).pairs
        page = chromium.new_page(base_url=site.url)
        page.goto(f"/pairs/{first}")
        page.get_by_label("API key").fill(ADMIN)
        page.keyboard.press("Enter")
        expect_pair(page, first)
        page.wait_for_function(
            "() => [...document.querySelectorAll('.picture')].every(image => image.naturalWidth > 0)"
        )
        page.keyboard.press("t")
        stored(page)
        assert site.get(f"/pairs/{first}")["verdict"]["reviewer"] == "bootstrap"

        page.get_by_role("button", name="Sign out").click()
        expect(page).to_have_url(re.compile("/sign-in$"))
        page.goto("/pairs")
        expect(page.get_by_label("API key")).to_be_visible()
        page.close()


@pytest.mark.parametrize("path", ["/", "/jobs/{job}", "/pairs", "/pairs/{pair}", "/samples", "/models"])
def test_pages_fit_on_a_phone(run: DrawnRun, page: Any, path: str) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(path.format(job=run.job_id, pair=run.pairs[0]))
    assert page.evaluate("document.documentElement.scrollWidth") == 390
