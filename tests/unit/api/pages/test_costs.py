"""The number of statements of a page does not depend on the number of rows, and what pages show is complete."""

import html
import json
import re
import shlex
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from api.pages import render
from service.db.tables import Event, Job, Pair, Stage, Table
from tests.drawn_results import draw_run
from tests.statements import statements
from tests.unit.api.pages.conftest import Site, site_of

PAGES = (
    "/",
    "/jobs/{job}",
    "/jobs/{job}/charts",
    "/jobs/{job}/stages",
    "/pairs?job={job}",
    "/samples?job={job}",
    "/models",
    "/rounds/new?clone={job}",
    "/jobs/{job}/report",
    "/jobs/compare?run={job}&run={job}",
)


@pytest.mark.parametrize("path", [*PAGES, "/pairs/{pair}?job={job}", "/samples/{sample}", "/models/{model}"])
def test_pages_run_a_fixed_number_of_statements(site: Site, path: str) -> None:
    counts = []
    for pairs in (2, 12):
        run = draw_run(site.service, pairs=pairs, rounds=2)
        sample = site.client.get(f"/pairs/{run.pairs[0]}").json()["target"]["id"]
        url = path.format(job=run.job_id, pair=run.pairs[0], sample=sample, model=run.model_id)
        with statements(site.service.uow.engine) as seen:
            assert site.browser.get(url).status_code == 200
        counts.append(len(seen))
    assert counts[0] == counts[1]
    assert counts[0] <= 40


def test_a_page_is_rendered_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    monkeypatch.setattr(render, "render_text", lambda template, **_: rendered.append(template) or "")
    assert site.browser.get("/").status_code == 200
    assert rendered == ["runs.html"]


def copies(site: Site, table: type[Table], row_id: str, count: int, **changes: Callable[[int], Any]) -> None:
    """Insert copies of a row, each with a new id and these changes by its number."""
    columns = table.__table__.columns
    with site.service.uow.writing() as session:
        [row] = session.execute(select(*columns).where(columns.id == row_id))
        rows = []
        for number in range(count):
            changed = {name: change(number) for name, change in changes.items()}
            rows.append({**row._mapping, "id": f"{row_id[:-5]}{number:05}", **changed})
        session.execute(insert(table), rows)


def cost(site: Site, url: str) -> tuple[int, int]:
    """The statements and the bytes of a page."""
    with statements(site.service.uow.engine) as seen:
        response = site.browser.get(url)
    assert response.status_code == 200
    return len(seen), len(response.content)


def test_a_list_of_a_thousand_runs_costs_a_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    with contextmanager(site_of)(tmp_path_factory) as site:
        draw_run(site.service)
        run = draw_run(site.service)
        [few, small] = cost(site, "/?limit=2")
        copies(site, Job, run.job_id, 1000, label=lambda number: f"run {number}")
        [count, size] = cost(site, "/")
        assert count == few
        assert site.browser.get("/").text.count("<progress") == 30  # a page of them
        assert size < 30 * small


@pytest.mark.slow
def test_a_run_with_ten_thousand_stages_costs_a_page(site: Site) -> None:
    run = draw_run(site.service)
    stages = site.client.get(f"/jobs/{run.job_id}/stages").json()["data"]
    urls = (f"/jobs/{run.job_id}?round=1", f"/jobs/{run.job_id}/stages")
    before = [cost(site, url) for url in urls]
    later = {"number": lambda number: number + 100, "shard": lambda number: number + 100}
    copies(site, Stage, stages[0]["id"], 10_000, round=lambda _number: 1, **later)
    with site.service.uow.writing() as session:
        ids = [f"{stages[0]['id'][:-5]}{number:05}" for number in range(10_000)]
        common = {"job_id": run.job_id, "at": 1.0, "kind": "stage.started", "message": "", "data": {"worker": "gpu-1"}}
        session.execute(insert(Event), [{**common, "stage_id": stage_id} for stage_id in ids])

    after = [cost(site, url) for url in urls]
    assert [count for count, _ in after] == [count for count, _ in before]
    assert max(size for _, size in after) < 150_000
    assert site.browser.get(urls[1]).text.count("<svg viewBox") == 60  # a page of them


def test_the_queue_goes_through_all_pairs_that_match(site: Site) -> None:
    run = draw_run(site.service, pairs=5, rounds=1)
    queue = {"job": run.job_id, "adopted": "true"}
    page = site.browser.get("/pairs", params=queue | {"limit": 2}).text
    assert page.count('class="pair-card"') == 2
    assert 'rel="next"' in page

    visited = []
    url = f"/pairs/{run.pairs[0]}?job={run.job_id}&adopted=true"
    while url:
        visited.append(url.partition("?")[0].removeprefix("/pairs/"))
        text = site.browser.get(url).text
        url = text.partition('data-next="')[2].partition('"')[0].replace("&amp;", "&")
    assert visited == [run.pairs[0], run.pairs[1], run.pairs[2], run.pairs[4]]  # the fourth is not adopted


def test_a_queue_with_a_filter_by_time_ends_in_time(site: Site) -> None:
    run = draw_run(site.service, pairs=3, rounds=1)
    last = site.client.get(f"/pairs/{run.pairs[2]}").json()["created_at"]
    queue = {"job": run.job_id, "created_before": last}
    with site.service.uow.writing() as session:
        for number, pair_id in enumerate(run.pairs):
            session.execute(update(Pair).where(Pair.id == pair_id).values(created_at=Pair.created_at + number - 2))

    pages = [site.browser.get(f"/pairs/{pair_id}", params=queue).text for pair_id in run.pairs[:2]]
    assert f'data-next="/pairs/{run.pairs[1]}?' in pages[0]
    assert 'data-next=""' in pages[1]


def test_charts_have_scores_prompts_and_updates(site: Site) -> None:
    run = draw_run(site.service, pairs=3, rounds=2)
    charts = site.client.get(f"/jobs/{run.job_id}/charts").json()
    assert charts["scorer"] == "brightness"
    train = [(row["training_images"], row["mean"]) for row in charts["scores"] if row["split"] == "train"]
    assert train == [
        (0, 0.3),
        (12, pytest.approx(0.34)),
        (24, pytest.approx(0.38)),
    ]  # three prompts with four samples each
    assert [len(prompt["points"]) for prompt in charts["prompts"]] == [2, 2, 2]
    assert charts["prompts"][0]["points"][0] == [1, pytest.approx(0.4)]  # reference 0.5 and base 0.3
    assert [update["number"] for update in charts["updates"]] == list(range(1, 25))
    assert [update["round"] for update in charts["updates"]] == [1] * 12 + [2] * 12
    assert charts["updates"][0]["loss"] == pytest.approx(0.683)


def test_a_model_leads_to_its_seed_prompts_and_pairs(site: Site) -> None:
    page = site.browser.get(f"/models/{site.run.model_id}").text
    assert f'href="/jobs/{site.run.job_id}?round=2"' in page
    assert f'href="/pairs?job={site.run.job_id}&amp;round=1"' in page
    assert "seed <code>7</code>" in page and ">tiny<" in page


def test_the_shown_commands_are_valid_requests(site: Site) -> None:
    """The bodies that pages show are accepted by the routes that they name."""
    for path in (f"/jobs/{site.run.job_id}", f"/pairs/{site.run.pairs[0]}"):
        text = html.unescape(site.browser.get(path).text)
        command = re.search(r"<code>(curl .*?)</code>", text, re.DOTALL)
        assert command is not None
        words = shlex.split(command[1])
        target = words[2].removeprefix("http://127.0.0.1")
        body = json.loads(words[words.index("-d") + 1])
        response = site.client.post(f"{target}?dry_run=true", json=body)
        problems = response.json().get("errors", [])
        # a fusion needs the trajectories, which drawn results do not have
        assert response.status_code == 200 or {p["pointer"] for p in problems} == {"/pair"}, response.text
