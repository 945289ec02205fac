"""The page that compares two runs: settings that differ, and images of the same prompts and seeds."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import update

from api.pages.comparison import differences
from service.db.queries import jobs
from service.db.tables import Sample
from tests.drawn_results import draw_run
from tests.service import round_body
from tests.unit.api.pages.conftest import Site


def test_settings_that_differ_are_found_at_any_depth() -> None:
    first = {"label": "x", "rounds": 1, "fusion": {"merge": "xor", "layers": "middle+up"}, "training": {"beta": 0.1}}
    second = {"label": "y", "rounds": 1, "fusion": None, "training": {"beta": 0.5, "lora": {"rank": 4}}}
    rows, equal = differences(first, second)
    assert {row.name: row.values for row in rows} == {
        "fusion.merge": ("xor", None),
        "fusion.layers": ("middle+up", None),
        "training.beta": ("0.1", "0.5"),
        "training.lora.rank": (None, "4"),
    }
    assert equal == 1  # rounds


def test_long_values_are_cut() -> None:
    prompts = [{"text": f"a [cat] on mat number {number}"} for number in range(50)]
    [row], _ = differences({"prompts": prompts}, {})
    assert row.values[0] is not None and row.values[0].endswith("… (50 entries)") and len(row.values[0]) < 150


def differing(site: Site, *job_ids: str) -> dict[str, list[str]]:
    """The values of the settings that differ, by name."""
    page = site.browser.get("/jobs/compare", params={"run": job_ids}).text
    rows = re.findall(r'<tr class="differs"><th scope="row"><code>([^<]+)</code></th>(.*?)</tr>', page)
    return {name: re.findall(r'<td class="wrap">([^<]*)</td>', cells) for name, cells in rows}


def test_a_run_of_an_earlier_version_has_the_defaults_of_newer_settings(site: Site) -> None:
    old_id, new_id = (site.client.post("/rounds", json=round_body()).json()["id"] for _ in range(2))
    with site.service.uow.writing() as session:
        job = jobs.get(session, old_id)
        spec = {name: value for name, value in job.spec.items() if name not in ("review_pairs", "update_reward")}
        sampling = {name: value for name, value in spec["sampling"].items() if name != "negative_prompt"}
        job.spec = spec | {"review": False, "sampling": sampling}
    assert differing(site, old_id, new_id) == {}


def test_a_name_that_refers_to_something_else_is_a_difference(site: Site) -> None:
    run = draw_run(site.service, rounds=2)
    [first, second] = site.client.get("/models", params={"job": run.job_id}).json()["data"]
    job_ids = []
    for model in (first, second):
        site.client.put("/aliases/compared", json={"model": model["id"]})
        job_ids.append(site.client.post("/rounds", json=round_body(model="compared")).json()["id"])
    assert differing(site, *job_ids) == {"model": [f"compared ({first['id']})", f"compared ({second['id']})"]}


def shown(page: str) -> list[tuple[str, list[str]]]:
    """The caption of each place, and the samples in it."""
    parts = re.findall(r'<li><p class="prompt">(.*?)</p>(.*?)</li>', page, re.DOTALL)
    return [(re.sub("<.*?>", "", caption), re.findall(r'href="/samples/(\w+)"', images)) for caption, images in parts]


def test_images_of_the_same_prompt_and_seed_are_side_by_side(site: Site) -> None:
    first, second = draw_run(site.service, pairs=3, rounds=1), draw_run(site.service, pairs=2, rounds=1, seed=8)
    page = site.browser.get(f"/jobs/compare?run={first.job_id}&run={second.job_id}").text
    places = shown(page)
    # drawn runs are not evaluated: reference and base of each of the three pairs of the first run
    assert [len(samples) for _, samples in places] == [2, 2, 2, 2, 1, 1]
    for caption, (one, *others) in places:
        sample = site.client.get(f"/samples/{one}").json()
        assert sample["job"] == first.job_id and sample["role"] in ("reference", "base")
        assert caption == f"{sample['prompt']} seed {sample['seed']}"
        for other in others:
            twin = site.client.get(f"/samples/{other}").json()
            assert twin["job"] == second.job_id
            assert (twin["prompt"], twin["seed"]) == (sample["prompt"], sample["seed"])
    assert page.count("no image with this seed") == 2
    assert re.findall(r'<tr class="differs"><th scope="row"><code>(\w+)', page) == ["seed"]


def test_evaluations_come_before_rollouts(site: Site) -> None:
    runs = [draw_run(site.service, pairs=2, rounds=rounds) for rounds in (1, 2)]
    with site.service.uow.writing() as session:
        for run in runs:
            session.execute(
                update(Sample).where(Sample.job_id == run.job_id, Sample.role == "target").values(role="evaluation")
            )
    address = f"/jobs/compare?run={runs[0].job_id}&run={runs[1].job_id}"
    page = site.browser.get(address).text
    assert "after round 1 of the first run and round 2 of the second" in page
    assert [len(samples) for _, samples in shown(page)] == [2, 2]
    assert "The evaluations after round 1." in site.browser.get(f"{address}&round=1").text
    assert "no images of this round" in site.browser.get(f"{address}&round=2").text


def test_images_come_in_pages(site: Site) -> None:
    run = draw_run(site.service, pairs=7, rounds=1)
    address = f"/jobs/compare?run={run.job_id}&run={run.job_id}"
    sizes = []
    while address:
        page = site.browser.get(address).text
        sizes.append(len(shown(page)))
        found = re.search(r'href="([^"]+)" rel="next"', page)
        address = found[1].replace("&amp;", "&") if found else ""
    assert sizes == [12, 2]


@pytest.mark.parametrize("query", ["", "run={job}", "run={job}&run={job}&run={job}", "run={job}&run=job_x"])
def test_exactly_two_runs_are_compared(site: Site, query: str) -> None:
    response = site.browser.get(f"/jobs/compare?{query.format(job=site.run.job_id)}")
    assert response.status_code == (404 if "job_x" in query else 422)


def test_programs_do_not_see_the_comparison(site: Site) -> None:
    response = site.client.get("/jobs/compare")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
