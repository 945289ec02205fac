"""The form that starts a run: its fields, its answers, clones, and that a form starts one run."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest

from api.pages.run_form import fields, groups, problems_of, request_of, texts_of
from dfusion.prompts import Prompt
from service.db.queries import jobs
from service.errors import FieldProblem
from service.jobs.kinds import KINDS, RoundSpec
from service.service import save_prompt_set
from service.states import JobKind
from tests.drawn_results import draw_run
from tests.service import PROMPTS, round_body
from tests.unit.api.pages.conftest import ADMIN, Site
from tests.unit.api.pages.test_security import csrf_of, make_key, signed_in

WEIGHTED = {"parts": [{"scorer": "brightness", "weight": 2.0}, {"scorer": "constant", "weight": 1.0}]}


def form_of(page: str) -> dict[str, str]:
    """What a browser would send for the form of a page."""
    text = page[page.index('<form id="new-run"') : page.rindex("</form>")]
    values = dict(re.findall(r'<input type="\w+"[^>]*? name="([^"]+)"[^>]*? value="([^"]*)"', text))
    values |= dict(re.findall(r'<textarea[^>]*? name="([^"]+)"[^>]*>([^<]*)</textarea>', text))
    for name, options in re.findall(r'<select[^>]*? name="([^"]+)"[^>]*>(.*?)</select>', text, re.DOTALL):
        choices = re.findall(r"<option ?([^>]*)>([^<]*)</option>", options)
        [chosen] = [choice for choice in choices if "selected" in choice[0]] or choices[:1]
        value = re.search(r'value="([^"]*)"', chosen[0])
        values[name] = chosen[1] if value is None else value[1]
    return {name: html.unescape(value) for name, value in values.items()}


def error_of(page: str, name: str) -> str:
    found = re.search(rf'id="error-{re.escape(name)}">([^<]*)<', page)
    assert found is not None, name
    return html.unescape(found[1])


def spec_of(site: Site, job_path: str) -> dict[str, Any]:
    return dict(site.client.get(job_path).json()["spec"])


def leaves(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict) or not value:
        return {prefix}
    return {name for key, inner in value.items() for name in leaves(inner, f"{prefix}.{key}".lstrip("."))}


def test_every_setting_has_a_field() -> None:
    spec = RoundSpec.model_validate({"prompt_set": "x"}).model_dump(mode="json")
    assert leaves(spec) - {"preset"} == set(fields()) - {"fusion", "evaluation"}


def test_each_field_is_shown_once(site: Site) -> None:
    page = site.browser.get("/rounds/new").text
    shown = re.findall(r'data-field="([^"]+)"', page)
    assert sorted(shown) == sorted(fields())
    assert {field.name for group in groups() for field in group.fields} < set(shown)


@pytest.mark.parametrize(
    "body",
    [
        *(example["value"] for example in KINDS[JobKind.ROUND].examples.values()),
        round_body(),
        round_body(fusion=None, evaluation=None, training={"algorithm": "dpok", "kl_reference": "base"}),
        round_body(reward=WEIGHTED, fusion={"layers": [3, 4], "first_step": 1}, label="v1.0"),
        {"prompt_set": "x", "preset": "released_code", "training": {"gradient_checkpointing": False}},
        {"prompt_set": "x", "evaluation": {"scorers": ["clip", WEIGHTED]}},
    ],
)
def test_a_form_keeps_the_request(body: dict[str, Any]) -> None:
    spec = RoundSpec.model_validate(body)
    again = RoundSpec.model_validate(request_of(texts_of(spec.model_dump(mode="json"))))
    assert again == spec.model_copy(update={"preset": None})


def test_texts_become_the_values_that_they_mean() -> None:
    form = {
        "prompt_set": "",
        "prompts": "a red [circle]\n\n [star] in blue \n",
        "rounds": "",
        "seed": " 7 ",
        "training.learning_rate": "1e-3",
        "training.beta": "much",
        "fusion": "off",
        "fusion.first_step": "3",
        "evaluation.scorers": "clip, judge",
    }
    assert request_of(form) == {
        "prompt_set": None,
        "prompts": [{"text": "a red [circle]"}, {"text": "[star] in blue"}],
        "seed": 7,
        "training": {"learning_rate": 0.001, "beta": "much"},
        "fusion": None,
        "evaluation": {"scorers": ["clip", "judge"]},
    }


def test_pointers_lead_to_the_fields() -> None:
    problems = problems_of(
        [
            FieldProblem("/training/beta", "too small"),
            FieldProblem("/training/beta", "odd"),
            FieldProblem("/prompts/1/text", "empty"),
            FieldProblem("/idempotency-key", "used"),
            FieldProblem("", "whole"),
        ]
    )
    assert problems.by_field == {"training.beta": "too small; odd", "prompts": "1/text: empty"}
    assert problems.others == ("idempotency-key: used", "whole")


def test_the_form_starts_a_run_once(site: Site) -> None:
    page = site.browser.get("/rounds/new").text
    form = form_of(page) | {"label": "from the form", "rounds": "2", "training.algorithm": "ddpo"}
    first = site.browser.post("/rounds/new", data=form | {"intent": "start"})
    second = site.browser.post("/rounds/new", data=form | {"intent": "start"})
    assert (first.status_code, second.status_code) == (303, 303)
    assert first.headers["location"] == second.headers["location"]

    spec = spec_of(site, first.headers["location"])
    expected = {"prompt_set": "shapes-attribute-train", "held_out_prompt_set": "shapes-attribute-test"}
    expected |= {"rounds": 2, "label": "from the form", "training": {"algorithm": "ddpo"}}
    started = site.client.post("/rounds", json=expected | {"label": "by a program"}).json()
    assert spec == started["spec"] | {"label": "from the form"}

    changed = site.browser.post("/rounds/new", data=form | {"seed": "5"})
    assert changed.status_code == 422
    assert "This form has started a run with other settings" in changed.text
    again = site.browser.post("/rounds/new", data=form_of(changed.text))
    assert again.status_code == 303 and again.headers["location"] != first.headers["location"]
    assert spec_of(site, again.headers["location"])["seed"] == 5


def test_problems_are_at_their_fields_and_nothing_is_lost(site: Site) -> None:
    entered = {
        "prompt_set": "",
        "prompts": "a [circle]",
        "rounds": "many",
        "training.algorithm": "ddpo",
        "training.beta": "0.5",
        "sampling.guidance_scale": "1000",
        "reward": "nobody",
        "label": "<b>x</b>",
    }
    page = site.browser.post("/rounds/new", data=form_of(site.browser.get("/rounds/new").text) | entered)
    assert page.status_code == 422
    assert error_of(page.text, "rounds") == "expected a number, got 'many'"
    assert "less than or equal to 100" in error_of(page.text, "sampling.guidance_scale")
    assert error_of(page.text, "training.beta") == "beta is a setting of dpo, not of ddpo"
    assert error_of(page.text, "seed") == ""
    assert form_of(page.text).items() >= entered.items()
    assert '<details class="card group" data-group="training" open>' in page.text
    assert '<details class="card group" data-group="pairing" >' in page.text

    # what only the installation knows comes when the values are valid
    valid = entered | {"rounds": "1", "training.algorithm": "dpo", "sampling.guidance_scale": "5"}
    page = site.browser.post("/rounds/new", data=form_of(page.text) | valid)
    assert page.status_code == 422
    assert "'nobody'" in error_of(page.text, "reward")


def test_the_estimate_is_that_of_a_dry_run(site: Site) -> None:
    form = form_of(site.browser.get("/rounds/new").text) | {"rounds": "3", "intent": "estimate"}
    before = len(site.client.get("/jobs").json()["data"])
    page = site.browser.post("/rounds/new", data=form)
    body = {"prompt_set": "shapes-attribute-train", "held_out_prompt_set": "shapes-attribute-test", "rounds": 3}
    dry = site.client.post("/rounds?dry_run=true", json=body).json()
    assert page.status_code == 200
    assert f"{dry['images']['total_at_most']:,} at most" in page.text
    assert f"{dry['unet_evaluations']['total_at_most']:,} evaluations at most" in page.text
    assert len(site.client.get("/jobs").json()["data"]) == before

    wrong = site.browser.post("/rounds/new", data=form | {"seed": "-1"})
    assert wrong.status_code == 200  # the user is not done yet
    assert "greater than or equal to 0" in error_of(wrong.text, "seed")


def test_the_presets_fill_the_form(site: Site) -> None:
    forms = {name: form_of(site.browser.get(f"/rounds/new?preset={name}").text) for name in ("paper", "released_code")}
    names = sorted(name for name in fields() if forms["paper"][name] != forms["released_code"][name])
    assert names == [
        "fusion.mask_source",
        "fusion.merge",
        "pairing.adoption_threshold",
        "pairing.dealing",
        "pairing.max_mask_cover",
        "training.ratio_clip",
    ]


def test_a_clone_has_the_settings_of_the_run_and_marks_what_differs(site: Site) -> None:
    own = draw_run(site.service, training={"beta": 0.5, "examples_per_update": 2})
    address = f"/rounds/new?clone={own.job_id}"
    form = form_of(site.browser.get(address).text)
    assert form["training.beta"] == "0.5"
    assert json.loads(form["prompts"]) == PROMPTS

    page = site.browser.post("/rounds/new", data=form | {"seed": "8", "intent": "estimate"}).text
    assert re.findall(r'class="field changed[^"]*" data-field="([^"]+)"', page) == ["seed"]
    assert "instead of 7" in page

    started = site.browser.post("/rounds/new", data=form_of(page) | {"intent": "start"})
    spec = spec_of(site, f"/jobs/{own.job_id}")
    assert spec_of(site, started.headers["location"]) == spec | {"seed": 8}
    assert f'href="{address}"' in site.browser.get(f"/jobs/{own.job_id}").text


def test_a_clone_uses_the_same_version_of_a_prompt_set(site: Site) -> None:
    def save(text: str) -> str:
        return save_prompt_set(site.service, "cloned", "", [Prompt.model_validate({"text": text})])[0].id

    old_id = save("a [cat]")
    body = {"model": "tiny", "prompt_set": "cloned", "reward": "brightness"}
    job_id = site.client.post("/rounds", json=body).json()["id"]
    assert form_of(site.browser.get(f"/rounds/new?clone={job_id}").text)["prompt_set"] == "cloned"
    save("a [dog]")
    assert form_of(site.browser.get(f"/rounds/new?clone={job_id}").text)["prompt_set"] == old_id


def test_a_clone_of_a_run_of_an_earlier_version_keeps_its_review(site: Site) -> None:
    job_id = site.client.post("/rounds", json=round_body(review=True)).json()["id"]
    with site.service.uow.writing() as session:
        job = jobs.get(session, job_id)
        job.spec = {name: value for name, value in job.spec.items() if name != "review_pairs"} | {"review": True}
    assert form_of(site.browser.get(f"/rounds/new?clone={job_id}").text)["review"] == "required"


def test_only_runs_with_rounds_are_cloned(site: Site) -> None:
    body = {"model": "tiny", "prompts": [{"text": "a [cat]"}]}
    job_id = site.client.post("/samplings", json=body).json()["id"]
    assert site.browser.get(f"/rounds/new?clone={job_id}").status_code == 404
    assert "clone=" not in site.browser.get(f"/jobs/{job_id}").text
    assert site.browser.get("/rounds/new?clone=job_x").status_code == 404


def test_text_that_cannot_be_stored_is_refused(site: Site) -> None:
    form = form_of(site.browser.get("/rounds/new").text)
    page = site.browser.post("/rounds/new", data=form | {"prompt_set": "", "prompts": '[{"text": "\\ud800"}]'})
    assert page.status_code == 400
    assert "expected text in UTF-8" in page.text
    assert site.browser.post("/rounds/new", data={f"x{n}": "" for n in range(300)}).status_code == 400


@pytest.mark.parametrize("hidden", [{"preset": "mine"}, {"clone": "x" * 101}])
@pytest.mark.parametrize("rounds", ["1", "many"])
def test_hidden_fields_that_no_page_has_are_refused(site: Site, hidden: dict[str, str], rounds: str) -> None:
    before = site.client.get("/jobs").json()["data"]
    form = form_of(site.browser.get("/rounds/new").text) | {"rounds": rounds}
    assert site.browser.post("/rounds/new", data=form | hidden).status_code == 422
    assert site.client.get("/jobs").json()["data"] == before


def test_the_form_needs_the_scope_and_the_token(guarded: Site) -> None:
    reader = signed_in(guarded, make_key(guarded, "read", "review")["key"])
    assert reader.get("/rounds/new").status_code == 403
    assert "/rounds/new" not in reader.get("/").text
    assert reader.post("/rounds/new", data={"csrf": csrf_of(reader)}).status_code == 403

    author = signed_in(guarded, make_key(guarded, "read", "submit")["key"])
    form = form_of(author.get("/rounds/new").text)
    assert author.post("/rounds/new", data=form | {"csrf": "0" * 64}).status_code == 403
    assert author.post("/rounds/new", data=form).status_code == 303
    other_site = {"Origin": "https://evil.example"}
    assert author.post("/rounds/new", data=form, headers=other_site).status_code == 403


def test_programs_do_not_see_the_form(site: Site) -> None:
    for response in (site.client.get("/rounds/new"), site.client.post("/rounds/new", json={})):
        assert response.status_code == 404
    assert site.client.get("/rounds/new", headers={"Authorization": f"Bearer {ADMIN}"}).status_code == 404
