"""Runs in Chromium: started from the form and followed to their end, cloned, compared, and after a restart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.jobs.kinds import RoundSpec
from service.service import cancel_job, create_job
from tests.drawn_results import draw_run
from tests.service import round_body, working
from tests.unit.api.pages.browser import Live, expect, live, watched_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("runs")) as site:
        yield site


@pytest.fixture
def page(chromium: Any, site: Live) -> Iterator[Any]:
    with watched_page(chromium, site.url) as opened:
        yield opened


def field(page: Any, name: str) -> Any:
    return page.locator(f"[data-field='{name}']")


def control(page: Any, name: str) -> Any:
    return page.locator(f"[id='{name}']")


def test_a_run_is_started_from_the_form_and_followed_to_its_end(site: Live, page: Any) -> None:
    page.goto("/")
    page.get_by_role("link", name="New run").first.click()
    control(page, "prompt_set").select_option("")
    control(page, "prompts").fill("a red and striped [circle]")
    control(page, "held_out_prompt_set").select_option("")
    control(page, "samples_per_prompt").fill("2")
    control(page, "label").fill("from the form")
    page.get_by_text("Sampling", exact=True).click()
    control(page, "sampling.num_steps").fill("4")
    # one prompt: two samples, which are one pair, and an evaluation before and after
    expect(page.locator("#estimate")).to_contain_text("2 sampled, 1 fused, 2 evaluated")

    page.get_by_role("button", name="Start run").dblclick()
    page.wait_for_url(re.compile("/jobs/job_"))
    job_id = page.url.rpartition("/")[2]
    expect(page.locator("h1")).to_contain_text("from the form")
    page.evaluate("window.isSamePage = true")
    with working(site.service):
        expect(page.locator("h1 .state")).to_have_text("succeeded", timeout=120_000)
    expect(page.locator(".chart figcaption").first).to_be_visible()
    expect(page.locator(".sample-grid img").first).to_be_visible()
    assert page.evaluate("window.isSamePage")
    assert site.get(f"/jobs/{job_id}")["outputs"]["models"] == 1
    labels = [job["label"] for job in site.get("/jobs")["data"]]
    assert labels.count("from the form") == 1  # although the button was clicked twice


def test_the_form_shows_errors_while_it_is_edited(page: Any) -> None:
    page.goto("/rounds/new")
    expect(page.locator("#estimate")).to_contain_text("Cost")
    control(page, "rounds").fill("many")
    expect(field(page, "rounds")).to_contain_text("expected a number, got 'many'")
    expect(control(page, "rounds")).to_have_attribute("aria-invalid", "true")
    page.locator("#estimate").get_by_role("link", name="rounds").click()
    expect(control(page, "rounds")).to_be_focused()
    control(page, "rounds").fill("2")
    expect(control(page, "rounds")).not_to_have_attribute("aria-invalid", "true")
    expect(page.locator("#estimate")).to_contain_text("1,280 sampled")  # 40 prompts, 16 samples, 2 rounds


@pytest.mark.long
def test_only_the_settings_that_count_are_shown(page: Any) -> None:
    page.goto("/rounds/new")
    expect(field(page, "prompts")).to_be_hidden()
    control(page, "prompt_set").select_option("")
    expect(field(page, "prompts")).to_be_visible()
    page.get_by_text("Training", exact=True).click()
    expect(field(page, "training.beta")).to_be_visible()
    control(page, "training.beta").fill("0.5")
    control(page, "training.algorithm").select_option("ddpo")
    expect(field(page, "training.beta")).to_be_hidden()
    expect(field(page, "training.clip_range")).to_be_visible()
    page.get_by_text("Fusion", exact=True).last.click()
    expect(field(page, "fusion.merge")).to_be_visible()
    control(page, "fusion").select_option("off")
    expect(field(page, "fusion.merge")).to_be_hidden()
    expect(page.get_by_text("Fusion is off.")).to_be_visible()


@pytest.mark.long
def test_a_clone_marks_what_is_changed(site: Live, page: Any) -> None:
    run = draw_run(site.service)
    page.goto(f"/jobs/{run.job_id}")
    page.get_by_role("link", name="Clone").click()
    expect(page.locator("h1")).to_have_text("Clone of drawn")
    expect(page.locator(".field.changed")).to_have_count(0)
    control(page, "seed").fill("8")
    expect(page.locator(".field.changed")).to_have_attribute("data-field", "seed")
    expect(field(page, "seed")).to_contain_text("instead of 7")
    control(page, "seed").fill("7")
    expect(page.locator(".field.changed")).to_have_count(0)


@pytest.mark.long
def test_the_form_works_without_scripts(chromium: Any, site: Live) -> None:
    context = chromium.new_context(base_url=site.url, java_script_enabled=False)
    page = context.new_page()
    page.goto("/rounds/new")
    control(page, "rounds").fill("0")
    page.get_by_role("button", name="Estimate").click()
    expect(field(page, "rounds")).to_contain_text("greater than or equal to 1")
    control(page, "rounds").fill("1")
    page.get_by_role("button", name="Start run").click()
    page.wait_for_url(re.compile("/jobs/job_"))
    cancel_job(site.service, page.url.rpartition("/")[2])
    context.close()


@pytest.mark.long
def test_two_runs_are_chosen_in_the_list_and_compared(site: Live, page: Any) -> None:
    first, second, third = (draw_run(site.service, seed=seed) for seed in (1, 2, 3))
    page.goto("/")

    def box(run: Any) -> Any:
        return page.locator(f"input[value='{run.job_id}']")

    button = page.get_by_role("button", name="Compare")
    expect(button).to_be_disabled()
    box(first).check()
    box(second).check()
    expect(box(third)).to_be_disabled()
    # a list that is read again keeps what was chosen
    page.evaluate(
        "import('/assets/page.js').then(async ({ refresh }) => { document.activeElement.blur(); await refresh(); })"
    )
    expect(box(first)).to_be_checked()
    button.click()
    expect(page.locator(".differs")).to_have_count(1)
    expect(page.locator(".differs")).to_contain_text("seed")
    expect(page.locator(".chart").first.locator(".legend li")).to_have_text(["A: drawn", "B: drawn"])
    expect(page.locator(".chart").first.locator("polyline")).to_have_count(2)


def test_a_page_goes_on_after_the_service_was_restarted(chromium: Any, tmp_path: Path) -> None:
    with live(tmp_path) as site:
        job_id = create_job(site.service, RoundSpec.model_validate(round_body(label="restarted")))
        url = site.url
        opened = watched_page(chromium, url, "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY")
        page = opened.__enter__()
        page.goto(f"/jobs/{job_id}")
        expect(page.locator("#live-state")).to_have_text("live")
        page.evaluate("window.isSamePage = true")
    expect(page.locator("#live-state")).to_have_text("connection lost, trying again")

    with live(tmp_path, port=int(url.rpartition(":")[2])) as site:
        expect(page.locator("#live-state")).to_have_text("live")
        cancel_job(site.service, job_id)
        expect(page.locator("h1 .state")).to_have_text("cancelled")
        assert page.evaluate("window.isSamePage")
        opened.__exit__(None, None, None)


@pytest.mark.long
@pytest.mark.parametrize("path", ["/rounds/new", "/jobs/compare?run={job}&run={job}", "/jobs/{job}/report"])
def test_pages_of_runs_fit_on_a_phone(site: Live, page: Any, path: str) -> None:
    run = draw_run(site.service)
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(path.format(job=run.job_id))
    assert page.evaluate("document.documentElement.scrollWidth") == 390
