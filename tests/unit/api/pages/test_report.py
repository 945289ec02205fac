"""The report of a run: its contents, its charts, its bounds, and that it is one file."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

import pytest
from PIL import Image
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.cli import app
from api.pages import report as reports
from api.pages.line_charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, ticks
from service.db.queries import results
from service.db.tables import Job, Metric, Sample, Score
from service.db.unit_of_work import UnitOfWork
from service.service import give_verdict
from service.states import Verdict
from service.storage import FileStore
from tests.cli import CliRunner
from tests.drawn_results import DrawnRun, draw_run
from tests.service import PROMPTS
from tests.unit.api.conftest import Live
from tests.unit.api.pages.conftest import Site


def report_of(site: Site, run: DrawnRun, **parameters: int) -> str:
    response = site.client.get(f"/jobs/{run.job_id}/report", params=parameters)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return response.text


def evaluated(site: Site, run: DrawnRun, last_round: int) -> None:
    """Let the bases be the evaluation before training, and the targets of the last round that after it.

    Their scores are 0.3 and 0.42.
    """
    with site.service.uow.writing() as session:
        of_run = update(Sample).where(Sample.job_id == run.job_id)
        first = of_run.where(Sample.round == 1)
        session.execute(first.where(Sample.role == "base").values(round=0, role="evaluation", split="train", number=0))
        last = of_run.where(Sample.round == last_round, Sample.role == "target")
        session.execute(last.values(role="evaluation", split="train", number=0))
        session.execute(of_run.where(Sample.role == "evaluation").values(seed=Sample.prompt_index))


def pictures(page: str) -> list[tuple[str, Image.Image]]:
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)" alt="([^"]*)"', page)
    return [(alt, Image.open(io.BytesIO(base64.b64decode(data)))) for _, data, alt in found]


def test_the_report_is_one_file_without_scripts(site: Site) -> None:
    run = draw_run(site.service, pairs=3, rounds=2)
    response = site.browser.get(f"/jobs/{run.job_id}/report")
    page = response.text
    assert response.headers["content-security-policy"].startswith("default-src 'none'; img-src data:;")
    assert response.headers["content-disposition"] == f'inline; filename="report-{run.job_id}.html"'
    assert page.startswith("<!doctype html>")
    assert not re.search(r"<script|<link|http|\son\w+=|url\(|src=\"(?!data:)|href=", page)
    assert f'href="/jobs/{run.job_id}/report"' in site.browser.get(f"/jobs/{run.job_id}").text


def test_the_report_shows_the_change_with_its_interval(site: Site) -> None:
    """Each image scores 0.12 more, so the interval is that difference."""
    run = draw_run(site.service, pairs=3, rounds=2)
    evaluated(site, run, 2)
    page = report_of(site, run)
    assert "On 3 training prompts brightness changed from 0.3000 to 0.4200 (+0.1200, 95 % interval" in page
    assert '<td class="n">+0.1200 to +0.1200</td>' in page
    assert "Scores before training and after round 2" in page
    shown = [alt for alt, _ in pictures(page) if alt.startswith(("before", "after"))]
    assert shown == [
        "before: a red and striped circle",
        "after: a red and striped circle",
        "before: the red circle above the blue square",
        "after: the red circle above the blue square",
        "before: a blue and dotted star",
        "after: a blue and dotted star",
    ]
    assert len([alt for alt, _ in pictures(report_of(site, run, prompts=1)) if alt.startswith("before")]) == 1


def test_a_list_can_contain_a_prompt_twice(site: Site) -> None:
    run = draw_run(site.service, pairs=3, rounds=2, prompts=[PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    evaluated(site, run, 2)
    assert "On 3 training prompts brightness changed from 0.3000 to 0.4200" in report_of(site, run)


def test_only_the_same_version_of_a_scorer_is_compared(site: Site) -> None:
    """An image has scores by two versions if a worker was upgraded between the shards of its evaluation."""
    run = draw_run(site.service, pairs=3, rounds=2)
    evaluated(site, run, 2)
    with site.service.uow.writing() as session:
        last = select(Sample.id).where(Sample.job_id == run.job_id, Sample.role == "evaluation", Sample.round == 2)
        session.add_all(
            Score(sample_id=sample_id, scorer="brightness", version="0", value=0.9)
            for sample_id in session.scalars(last)
        )
    assert "changed from 0.3000 to 0.4200" in report_of(site, run)

    with site.service.uow.writing() as session:
        later = update(Metric).where(Metric.job_id == run.job_id, Metric.round == 2, Metric.split == "train")
        session.execute(later.values(version="0"))
    page = report_of(site, run)
    assert "changed from" not in page and "Scores before training" not in page


def test_images_are_read_without_a_transaction(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage can be slow, and connections to the database are few."""
    run = draw_run(site.service, pairs=1, rounds=1)
    depths: Counter[int] = Counter()
    during_reads = []
    begin = UnitOfWork.reading
    read = FileStore.read

    @contextmanager
    def counted(uow: UnitOfWork) -> Iterator[Session]:
        with begin(uow) as session:
            depths[get_ident()] += 1
            yield session
            depths[get_ident()] -= 1

    def watched(store: FileStore, key: str, start: int, size: int) -> Iterator[bytes]:
        during_reads.append(depths[get_ident()])
        return read(store, key, start, size)

    monkeypatch.setattr(UnitOfWork, "reading", counted)
    monkeypatch.setattr(FileStore, "read", watched)
    report_of(site, run)
    assert during_reads == [0] * 5  # the statistics of the update, base, reference, target and mask


def test_a_large_evaluation_has_means_without_intervals(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = draw_run(site.service, pairs=3, rounds=2)
    evaluated(site, run, 2)
    monkeypatch.setattr(reports, "_MOST_MEASURED", 20)  # the metrics count 12 images of one split
    page = report_of(site, run, prompts=2)
    assert '<td class="n">0.3000</td><td class="n">0.3800</td><td class="n">+0.0800</td><td class="n">-</td>' in page
    assert "Without intervals" in page and "95 % interval " not in page
    assert len([alt for alt, _ in pictures(page) if alt.startswith("before")]) == 2


def test_pairs_with_verdicts_come_first(site: Site) -> None:
    run = draw_run(site.service, pairs=4, rounds=2)
    give_verdict(site.service, run.pairs[7], Verdict.BASE, "ann", None)
    page = report_of(site, run, pairs=2)
    assert "Pairs of round 2" in page
    labels = re.findall(r'</h3><p class="note">(.*?)</p>', page)
    assert labels == ["not adopted, verdict: base by ann", "adopted"]
    heads = [alt.partition(":")[0] for alt, _ in pictures(page)]
    assert heads == ["base", "reference", "target", "mask"] * 2
    assert pictures(report_of(site, run, pairs=0)) == []


def test_large_images_are_scaled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = draw_run(site.service, pairs=1, rounds=1, side=600)
    sizes = {image.size for _, image in pictures(report_of(site, run))}
    assert sizes == {(600, 600)}  # few bytes, since they are drawn
    monkeypatch.setattr(reports, "_SMALL_BYTES", 100)
    shown = pictures(report_of(site, run))
    assert {(image.size, image.format) for _, image in shown} == {((256, 256), "WEBP")}


def test_a_run_without_results_has_a_report(site: Site) -> None:
    job_id = site.client.post("/rounds", json={"prompt_set": "shapes-attribute-train", "label": "new"}).json()["id"]
    page = site.client.get(f"/jobs/{job_id}/report").text
    assert "<h1>new</h1>" in page and "<h2>Settings</h2>" in page
    assert "<h2>Curves" not in page and "<h2>Pairs" not in page
    assert site.client.get("/jobs/job_x/report").status_code == 404
    assert site.client.get(f"/jobs/{job_id}/report?pairs=51").status_code == 422


def test_charts_of_the_report_are_drawings_with_axes(site: Site) -> None:
    run = draw_run(site.service, pairs=3, rounds=2)
    page = report_of(site, run)
    drawings = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    labels = [drawing.attrib["aria-label"].partition(".")[0] for drawing in drawings]
    assert labels == [
        "brightness",
        "Loss",
        "Log-ratio of both sides",
        "KL divergence from the policy before",
        "Gradient norm",
    ]
    texts = [element.text for element in drawings[0].iter("text")]
    assert "images used for training" in texts and "brightness" in texts
    assert len(list(drawings[0].iter("polyline"))) == 2  # training prompts and samples


def test_a_line_is_placed_within_its_axes() -> None:
    chart = line_chart("t", "x", "y", {"a": [(0, 1.0), (10, 3.0)], "b": [(5, float("nan"))]})
    assert chart is not None
    [line] = chart.lines
    # a margin of 8 % of the range below and above: 2 / 2.32 of the height between them
    height = HEIGHT - TOP - BOTTOM
    margin = 0.16 / 2.32 * height
    assert line.places[0] == pytest.approx((LEFT, HEIGHT - BOTTOM - margin))
    assert line.places[1] == pytest.approx((WIDTH - RIGHT, TOP + margin))
    assert chart.summary == "a: 1 to 3"
    assert line_chart("t", "x", "y", {"b": [(5, float("nan"))]}) is None


def test_a_long_line_is_thinned_but_ends_where_it_ends() -> None:
    chart = line_chart("t", "x", "y", {"a": [(n, float(n)) for n in range(10_001)]})
    assert chart is not None
    [line] = chart.lines
    assert 300 < len(line.places) <= 402 and line.dots == ()
    assert line.places[-1][0] == WIDTH - RIGHT


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.29, 0.44, [0.3, 0.35, 0.4]), (-3, 3, [-2, 0, 2]), (5, 5, [5])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5 if high == 10 else 3) == pytest.approx(expected)


def test_the_client_and_the_command_line_save_the_report(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    saved = CliRunner().invoke(app, ["--url", live.url, "jobs", "report", live.done_job, "--output", str(file)])
    assert saved.exit_code == 0, saved.output
    with live.client() as client:
        job = client.job(live.done_job)
        changed = list(client.samples(job=job.id, role="evaluation", round=1))
    page = file.read_text("utf-8")
    assert live.done_job in page
    # every evaluated image of the small run is among the first prompts, before and after
    assert page.count('alt="after: ') == len(changed) == 3
    with live.service.uow.reading() as session:
        scores = results.scores(session, [sample.id for sample in changed])
    mean = sum(score.value for of_sample in scores.values() for score in of_sample) / 3
    assert f'<td class="n">{mean:.4f}</td>' in page
    assert isinstance(scores[changed[0].id][0], Score)


def test_the_best_round_and_the_stop_are_shown(site: Site) -> None:
    """On the page of the run and in its report; without them there is no such line."""
    run = draw_run(site.service)
    job = site.client.get(f"/jobs/{run.job_id}").json()
    best = {"round": 1, "model": job["model"], "split": "held_out", "scorer": "shapes-judge", "mean": 0.75}
    stopped = {"round": 2, "rounds": 9, "sign": "saturation", "reason": "the reward is at its ceiling while x falls"}
    lines = (
        "Best round 1, shapes-judge 0.75",
        "Stopped after round 2 of 9: the reward is at its ceiling while x falls.",
    )

    def texts() -> list[str]:
        pages = [site.browser.get(f"/jobs/{run.job_id}{path}").text for path in ("", "/report")]
        return [" ".join(re.sub(r"</?[a-z][^>]*>", " ", page).split()).replace(" ,", ",") for page in pages]

    def record(**values: object) -> None:
        with site.service.uow.writing() as session:
            session.execute(update(Job).where(Job.id == run.job_id).values(values))

    assert not any(line in text for line in lines for text in texts())
    record(best=best, stopped=stopped)
    try:
        assert all(line in text for line in lines for text in texts())
    finally:
        record(best=None, stopped=None)  # the site is shared
