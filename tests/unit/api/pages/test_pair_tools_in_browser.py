"""Denoising steps, fusing again and trying a prompt in Chromium, with a worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from service.jobs.kinds import FusionJobSpec, SamplingJobSpec, TrainingJobSpec
from service.service import create_job
from tests.service import PROMPTS, work_until_idle, working
from tests.unit.api.pages.browser import Live, expect, live, watched_page

pytestmark = pytest.mark.slow
STEPS = {"num_steps": 4}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    from dfusion import _torchvision_ops  # noqa: F401  (before diffusers or peft)
    from tests.nets import tiny_pipeline

    pipeline = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(pipeline)
    with live(tmp_path_factory.mktemp("tools"), pipeline=pipeline) as site:
        yield site


@pytest.fixture(scope="module")
def pair(site: Live) -> str:
    """A fused pair whose prompt has two items."""
    body = {
        "model": "tiny",
        "prompts": [PROMPTS[1] | {"thresholds": [0.02, 0.9]}],
        "samples_per_prompt": 2,
        "sampling": STEPS,
    }
    sampling = create_job(site.service, SamplingJobSpec.model_validate(body | {"scorers": ["brightness"]}))
    work_until_idle(site.service)
    fusion = {"sampling": sampling, "fusion": {"first_step": 1, "last_step": 2}, "reward": "brightness"}
    create_job(site.service, FusionJobSpec.model_validate(fusion))
    work_until_idle(site.service)
    return str(site.get("/pairs")["data"][0]["id"])


@pytest.fixture
def page(chromium: Any, site: Live) -> Iterator[Any]:
    with watched_page(chromium, site.url, "422") as opened:
        yield opened


def pixels(page: Any, role: str) -> str:
    """What the canvas of a side shows."""
    return str(page.locator(f"denoising-steps figure[data-role={role}] canvas").evaluate("c => c.toDataURL()"))


def test_denoising_steps_are_made_on_demand_and_shown_by_keys(site: Live, pair: str, page: Any) -> None:
    page.goto(f"/pairs/{pair}")
    expect(page.locator("#denoising")).to_be_hidden()  # the pair is blind
    page.keyboard.press("b")
    with working(site.service):
        page.get_by_role("button", name="Show denoising steps").click()
        step = page.get_by_label("Step", exact=True)
        expect(step).to_have_attribute("aria-valuetext", "step 4 of 4")
    assert page.locator("#pair").get_attribute("data-verdict") == ""
    expect(page.locator("denoising-steps canvas").first).to_have_attribute("aria-label", "base, step 4 of 4")

    last = {role: pixels(page, role) for role in ("base", "target", "reference")}
    page.keyboard.press(",")
    page.keyboard.press(",")
    page.keyboard.press(".")
    expect(step).to_have_attribute("aria-valuetext", "step 3 of 4")
    before = {role: pixels(page, role) for role in last}
    assert all(before[role] != last[role] for role in last)
    for _ in range(3):
        page.keyboard.press(",")
    assert pixels(page, "base") == pixels(page, "target") != pixels(page, "reference")  # they share their noise

    expect(page.get_by_label("Mask", exact=True).locator("option")).to_have_text(["none", "merged", "circle", "square"])
    unmasked = pixels(page, "reference")
    page.get_by_label("at", exact=True).select_option("all fused steps")
    shown = {}
    for choice in ("merged", "circle", "square"):
        page.get_by_label("Mask", exact=True).select_option(choice)
        shown[choice] = pixels(page, "reference")
    assert shown["merged"] == shown["circle"] != unmasked
    assert shown["square"] == unmasked  # no attention is above its threshold
    label = page.locator("figure[data-role=reference] canvas").get_attribute("aria-label")
    assert label == "reference, step 0 of 4, mask: square at all fused steps"
    page.get_by_label("Mask", exact=True).select_option("none")
    assert pixels(page, "reference") == unmasked


def test_a_pair_is_fused_again_next_to_its_old_target(site: Live, pair: str, page: Any) -> None:
    page.goto(f"/pairs/{pair}")
    page.keyboard.press("b")
    form = page.locator("fuse-again")
    first = form.get_by_label("First step")
    expect(first).to_have_value("1")
    expect(form.get_by_label("Threshold of square")).to_have_value("0.9")
    first.fill("9")
    button = form.get_by_role("button", name="Fuse again")
    button.click()
    expect(form.locator("[data-pointer='/fusion/last_step'] .field-error")).to_contain_text(
        "last_step must be at least"
    )

    first.fill("2")
    form.get_by_label("Threshold of square").fill("0.5")
    with working(site.service):
        button.click()
        expect(form.get_by_text("New and old target")).to_be_visible()
    rows = form.locator("#comparison tbody").first.locator("tr")
    expect(rows).to_have_text([re.compile(r"first step\s*1\s*2"), re.compile(r"thresholds\s*0.02, 0.9\s*0.02, 0.5")])
    expect(form.get_by_role("img", name="New target", exact=True)).to_be_visible()
    form.get_by_role("link", name="Open the new pair").click()
    expect(page.locator("#pair")).not_to_have_attribute("data-pair", pair)
    [old] = [listed for listed in site.get("/pairs")["data"] if listed["id"] == pair]
    assert old["thresholds"] == [0.02, 0.9]


@pytest.mark.long
def test_a_prompt_is_tried_with_a_model_and_its_base(site: Live, pair: str, page: Any) -> None:
    fusion = site.get(f"/pairs/{pair}")["job"]
    training = {"jobs": [fusion], "training": {"examples_per_update": 1, "inner_epochs": 1}}
    create_job(site.service, TrainingJobSpec.model_validate(training))
    work_until_idle(site.service)
    [model, *_] = site.get("/models")["data"]

    page.goto(f"/models/{model['id']}")
    page.get_by_label("Seed").fill("x")
    page.get_by_label("Images").select_option("2")
    page.get_by_label("Scorer").select_option("brightness")
    page.get_by_role("button", name="Sample").click()
    expect(page.locator("[data-pointer='/seed'] .field-error")).to_contain_text("number")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Prompt", exact=True).fill("a red [circle]")
    with working(site.service):
        page.get_by_role("button", name="Sample").click()
        expect(page.locator(".tried img")).to_have_count(4)
    names = [image.get_attribute("alt") for image in page.locator(".tried img").all()]
    title = f"tiny, round {model['round']}"
    assert names == ["tiny, image 1", f"{title}, image 1", "tiny, image 2", f"{title}, image 2"]
    [job] = site.get("/jobs", kind="evaluation")["data"]
    seeds = [sample["seed"] for sample in site.get("/samples", job=job["id"])["data"]]
    assert len(set(seeds)) == 2  # those of both models
