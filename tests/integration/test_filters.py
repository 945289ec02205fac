"""Filters of lists by time, prompt, role and score, against a search through all rows. On both databases."""

import random
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text, update

from api.main import create_app
from service.db.queries import results
from service.db.queries.pages import MAX_READ, encode_cursor
from service.db.tables import Job, Score
from service.service import Service
from tests.service import service_of, settings_for
from tests.statements import statements
from tests.stored_pairs import Results

Row = dict[str, Any]
Matches = Callable[[Row], bool]
ROWS = 30
ID = f"smp_{1:026d}"
START = 1_700_000_000.25
TEXTS = (
    "a red circle",
    "a blue star",
    "a green square",
    "a red  circle, larger",
)  # its items were given, so it is unchanged
ROLES = ("plain", "base", "reference")


@pytest.fixture
def client(tmp_path: Path, pipeline: Path, database_url: str) -> Iterator[TestClient]:
    """The application without a worker."""
    with TestClient(create_app(settings_for(tmp_path / "data", pipeline, database_url=database_url))) as client:
        yield client


@pytest.fixture
def service(client: TestClient) -> Service:
    return service_of(client)


def fill(service: Service) -> list[str]:
    """Two jobs of 30 samples and 30 pairs each, whose times are not in the order of their ids. Returns the jobs."""
    dice = random.Random(3)
    jobs = []
    for _ in range(2):
        rows = Results.of_new_job(service)
        jobs.append(rows.job_id)
        file = rows.artifact("file")
        samples, pairs, scores = [], [], []
        for number in range(ROWS):
            prompt = dice.choice(TEXTS)
            time = START + dice.randrange(20)
            sample = rows.sample(number, file, prompt=prompt, created_at=time, role=dice.choice(ROLES))
            samples.append(sample)
            for scorer, version in (("clip", "1"), ("clip", "2"), ("judge", "1")):
                if dice.random() < 0.5:
                    value = dice.randrange(5) / 4
                    scores.append(Score(sample_id=sample.id, scorer=scorer, version=version, value=value))
            target = dice.choice((None, 0.25, 0.5, 0.75))
            scorer = dice.choice(("clip", "judge"))
            values = {"prompt": prompt, "created_at": time, "target_score": target, "scorer": scorer}
            pairs.append(rows.pair(number, sample.id, sample.id, target_id=target and sample.id, **values))
        with service.uow.writing() as session:
            results.add_all(session, [file, *samples])
            results.add_all(session, [*scores, *pairs])
    return jobs


def all_of(client: TestClient, path: str, limit: int = 7, **filters: Any) -> tuple[list[Row], int]:
    """The rows of all pages, and the number of pages."""
    rows: list[Row] = []
    cursor: str | None = None
    count = 0
    while True:
        parameters = {"limit": limit, **filters} | ({} if cursor is None else {"cursor": cursor})
        answer = client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["data"]) <= limit
        rows += page["data"]
        cursor = page["next_cursor"]
        count += 1
        if not page["has_more"]:
            return rows, count


def created(row: Row) -> datetime:
    return datetime.fromisoformat(row["created_at"])


def scored(row: Row, scorer: str, low: float, high: float) -> bool:
    if "scores" in row:
        return any(score["scorer"] == scorer and low <= score["value"] <= high for score in row["scores"])
    if row["scorer"] != scorer:
        return False
    infinite = (low, high) == (float("-inf"), float("inf"))
    return infinite or (row["target"] is not None and low <= row["target"]["score"] <= high)


AFTER = datetime.fromtimestamp(START + 5).astimezone()
BEFORE = AFTER + timedelta(seconds=10)
INFINITY = float("inf")
COMMON: dict[str, tuple[dict[str, Any], Matches]] = {
    "after": ({"created_after": AFTER.isoformat()}, lambda row: created(row) >= AFTER),
    "before": ({"created_before": BEFORE.isoformat()}, lambda row: created(row) < BEFORE),
    "prompt": ({"prompt": "a  [red] circle "}, lambda row: row["prompt"] == "a red circle"),
    "unchanged": ({"prompt": TEXTS[3]}, lambda row: row["prompt"] == TEXTS[3]),
    "prompts": ({"prompt": [TEXTS[1], TEXTS[2], "unknown"]}, lambda row: row["prompt"] in TEXTS[1:3]),
    "scorer": ({"scorer": "clip"}, lambda row: scored(row, "clip", -INFINITY, INFINITY)),
    "min": ({"scorer": "clip", "score_min": 0.75}, lambda row: scored(row, "clip", 0.75, INFINITY)),
    "bounds": (
        {"scorer": "judge", "score_min": 0.25, "score_max": 0.5},
        lambda row: scored(row, "judge", 0.25, 0.5),
    ),
}
ROLE_FILTERS: dict[str, tuple[dict[str, Any], Matches]] = {
    "role": ({"role": "base"}, lambda row: row["role"] == "base"),
    "roles": ({"role": ["base", "plain"]}, lambda row: row["role"] in ("base", "plain")),
}
COMBINATIONS = (
    *((name,) for name in COMMON),
    ("after", "before"),
    ("after", "before", "prompt", "bounds"),
    ("after", "prompts"),
    ("before", "prompts", "min"),
    ("job", "after", "before"),
    ("job", "prompts", "scorer"),
    ("role",),
    ("roles",),
    ("role", "after", "before"),
    ("roles", "prompt", "min"),
    ("job", "roles", "prompts", "after", "bounds"),
)


def test_filters_select_the_rows_of_a_search_through_all(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pages that read 8 rows at most, and with those that read all."""
    jobs = fill(service)
    in_job: tuple[dict[str, Any], Matches] = ({"job": jobs[1]}, lambda row: row["job"] == jobs[1])
    for path in ("/samples", "/pairs"):
        filters = {**COMMON, "job": in_job} | (ROLE_FILTERS if path == "/samples" else {})
        everything = all_of(client, path, 200)[0]
        assert len(everything) == 2 * ROWS

        for names in COMBINATIONS:
            if not filters.keys() >= set(names):
                continue
            parameters: dict[str, Any] = {}
            for name in names:
                parameters |= filters[name][0]
            expected = {row["id"] for row in everything if all(filters[name][1](row) for name in names)}
            for max_read in (8, MAX_READ):
                monkeypatch.setattr(results, "MAX_READ", max_read)
                ids = [row["id"] for row in all_of(client, path, **parameters)[0]]
                assert (sorted(ids), max_read) == (sorted(expected), max_read), (path, names)
            assert expected, (path, names)


def test_a_list_by_time_is_in_order_of_time_and_a_row_is_in_one_of_two_adjacent_periods(
    client: TestClient, service: Service
) -> None:
    fill(service)
    by_time = all_of(client, "/samples", created_after="2000-01-01T00:00:00Z")[0]
    assert [(row["created_at"], row["id"]) for row in by_time] == sorted(
        (row["created_at"], row["id"]) for row in by_time
    )
    middle = by_time[ROWS]["created_at"]
    before = all_of(client, "/samples", created_before=middle)[0]
    after = all_of(client, "/samples", created_after=middle)[0]
    assert (before + after, by_time[ROWS] in after) == (by_time, True)


def test_jobs_by_time(client: TestClient, service: Service) -> None:
    jobs = [Results.of_new_job(service).job_id for _ in range(6)]
    with service.uow.writing() as session:
        for job_id, time in zip(jobs, (3.0, 1.0, 2.0, 2.0, 5.0, 4.0), strict=True):
            session.execute(update(Job).where(Job.id == job_id).values(created_at=START + time))

    def ids(**filters: Any) -> list[str]:
        return [row["id"] for row in all_of(client, "/jobs", 2, **filters)[0]]

    def at(seconds: float) -> str:
        return datetime.fromtimestamp(START + seconds).astimezone().isoformat()

    assert ids(created_after=at(2)) == [jobs[4], jobs[5], jobs[0], jobs[3], jobs[2]]
    assert ids(created_after=at(2), created_before=at(4)) == [jobs[0], jobs[3], jobs[2]]
    assert ids(created_before=at(2), kind=["round", "fusion"]) == [jobs[1]]
    assert ids(created_before=at(1)) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("parameters", "pointers", "message"),
    [
        ({"created_after": "2026-01-31T12:00:00"}, ["/created_after"], "without a time zone"),
        ({"created_before": "yesterday"}, ["/created_before"], "expected an ISO 8601 time with a time zone"),
        ({"created_before": "1700000000"}, ["/created_before"], "expected an ISO 8601 time with a time zone"),
        (
            {"created_after": "2026-01-31T12:00:00Z", "created_before": "2026-01-31T12:00:00+01:00"},
            ["/created_after"],
            "expected created_after <= created_before",
        ),
        ({"score_min": 0}, ["/score_min"], "expected a scorer"),
        ({"score_min": 0, "score_max": 1}, ["/score_min", "/score_max"], "expected a scorer"),
        ({"scorer": "clip", "score_min": 1, "score_max": 0}, ["/score_min"], "expected score_min <= score_max"),
        ({"scorer": "clip", "score_min": "nan"}, ["/score_min"], "finite"),
        ({"scorer": "clip", "score_max": "inf"}, ["/score_max"], "finite"),
        ({"prompt": ""}, ["/prompt/0"], "at least 1 character"),
        ({"prompt": ["x"] * 21}, ["/prompt"], "at most 20"),
        ({"scorer": ["clip", "judge"]}, ["/scorer"], "expected one value"),
        ({"created_after": "2026-01-31T12:00:00Z", "cursor": encode_cursor(ID)}, ["/cursor"], "next_cursor"),
        ({"created_after": "2026-01-31T12:00:00Z", "cursor": encode_cursor(f"nan {ID}")}, ["/cursor"], "next_cursor"),
        ({"cursor": encode_cursor(f"1.0 {ID}")}, ["/cursor"], "next_cursor"),
    ],
)
def test_invalid_filters(client: TestClient, parameters: dict[str, Any], pointers: list[str], message: str) -> None:
    """The cursors are those of lists in another order."""
    for path in ("/samples", "/pairs"):
        answer = client.get(path, params=parameters)
        assert answer.status_code == 422
        assert [error["pointer"] for error in answer.json()["errors"]] == pointers
        assert message in answer.json()["detail"]


COPIES = 2 * MAX_READ + 5_000
_COPY = """
INSERT INTO samples (id, job_id, stage_id, round, role, split, prompt_index, prompt, number, seed, model_id,
  image_artifact_id, created_at)
WITH RECURSIVE n(i) AS (SELECT 10001 UNION ALL SELECT i + 1 FROM n WHERE i < {last})
SELECT 'smp_000000000000000000000' || CAST(i AS text), job_id, stage_id, round, role, split, prompt_index, prompt, i,
  seed, model_id, image_artifact_id, i FROM samples, n
"""
_READ = re.compile(r"Scan .*\(actual rows=([\d.]+) loops=([\d.]+)\)")
_REMOVED = re.compile(r"Rows Removed by Filter: (\d+)")


def copy_samples(service: Service) -> None:
    """Two samples of one prompt at the end of 25,000 others, and a score of the last one."""
    rows = Results.of_new_job(service)
    file = rows.artifact("file")
    with service.uow.writing() as session:
        results.add_all(session, [file, rows.sample(0, file, created_at=0.0)])
        session.execute(text(_COPY.format(last=10_000 + COPIES)))
        last = [rows.sample(number, file, role="target", prompt="the last", created_at=START) for number in (1, 2)]
        for number, sample in enumerate(last):
            sample.id = f"smp_{'z' * 25}{number}"
        results.add_all(session, last)
        results.add_all(session, [Score(sample_id=last[1].id, scorer="clip", version="1", value=1.0)])
    if service.uow.engine.dialect.name == "postgresql":
        with service.uow.engine.connect() as connection:
            connection.exec_driver_sql("ANALYZE samples, scores")


def rows_read(service: Service, seen: list[tuple[str, Any]]) -> float:
    """The most rows of `samples` that a statement reads, by PostgreSQL's own count."""
    most = 0.0
    for statement, parameters in seen:
        if "FROM samples" not in statement:
            continue
        with service.uow.engine.connect() as connection:
            # a scan of so small a table costs about as much as that of an index
            connection.exec_driver_sql("SET enable_seqscan = off")
            connection.exec_driver_sql("SET enable_bitmapscan = off")
            options = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF)"
            plan = "\n".join(connection.exec_driver_sql(f"{options} {statement}", parameters).scalars())
        read = sum(float(rows) * float(loops) for rows, loops in _READ.findall(plan.split("SubPlan")[0]))
        most = max(most, read + sum(map(int, _REMOVED.findall(plan))))
    return most


SPARSE: tuple[dict[str, Any], ...] = (
    {"scorer": "clip"},
    {"scorer": "clip", "score_min": 0.5, "role": ["target", "plain"]},
    {"role": ["target", "base"]},
    {"created_before": "2100-01-01T00:00:00Z", "role": "target"},
    {"created_after": "1970-01-01T00:00:00Z", "scorer": "clip"},
)
INDEXED: tuple[dict[str, Any], ...] = (
    {"prompt": "the last"},
    {"prompt": ["the last", "unknown"], "scorer": "clip"},
    {"created_after": "2020-01-01T00:00:00Z"},
    {"created_after": "2020-01-01T00:00:00Z", "scorer": "clip"},
)


def test_a_page_reads_a_limited_number_of_rows(client: TestClient, service: Service) -> None:
    copy_samples(service)
    for filters in (*SPARSE, *INDEXED):
        with statements(service.uow.engine) as seen:
            rows, pages = all_of(client, "/samples", **filters)
        assert [row["id"][-1] for row in rows] == (["1"] if "scorer" in filters else ["0", "1"])
        assert pages == (1 if filters in INDEXED else 1 + COPIES // MAX_READ), filters

        # independent of the values of the filters
        of_samples = [statement for statement, _ in seen if "FROM samples" in statement]
        assert len(of_samples) <= 2 * pages * (2 if isinstance(filters.get("prompt"), list) else 1)
        if service.uow.engine.dialect.name == "postgresql":
            assert rows_read(service, seen) <= (MAX_READ if filters in SPARSE else 10), filters
            continue
        for statement, parameters in seen:
            if "FROM samples" in statement:
                with service.uow.engine.connect() as connection:
                    plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
                    steps = [step[3] for step in plan]
                assert all(" INDEX " in step or "SUBQUERY" in step for step in steps), steps
