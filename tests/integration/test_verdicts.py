"""Verdicts on both databases: many reviewers at once, of whom one gives the last verdict of a review."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from service.db.queries import jobs, results, verdicts
from service.db.tables import Event, Stage
from service.service import Service, give_verdict
from service.states import JobState, StageKind, StageState, Verdict
from tests.service import settings_for
from tests.stored_pairs import add_pairs


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    opened = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=database_url))
    yield opened
    opened.close()


def test_reviewers_judge_at_once_and_end_the_review_once(service: Service) -> None:
    """Two of three reviewers prefer the target of each pair, whoever comes first."""
    # 1. a job that waits for verdicts on four pairs
    pairs = add_pairs(service, 4)
    with service.uow.writing() as session:
        first = results.get_pair(session, pairs[0])
        job_id = first.job_id
        review = {"kind": StageKind.REVIEW, "state": StageState.WAITING, "unmet": 0}
        session.execute(update(Stage).where(Stage.id == first.stage_id).values(review))
        assert jobs.become(session, job_id, JobState.WAITING)

    # 2. all verdicts in the same moment
    choices = {"ann": Verdict.TARGET, "bob": Verdict.BASE, "eve": Verdict.TARGET}
    with ThreadPoolExecutor(6) as threads:
        given = threads.map(
            lambda request: give_verdict(service, request[0], choices[request[1]], request[1], None),
            product(pairs, choices),
        )
        assert len(list(given)) == 12

    # 3. none is lost
    with service.uow.reading() as session:
        for pair_id in pairs:
            pair = results.get_pair(session, pair_id)
            assert (pair.reviewers, pair.revision, pair.verdict, pair.verdict_by) == (3, 3, "target", None)
            rows = verdicts.of_pairs(session, [pair_id])[pair_id]
            assert {row.reviewer: row.prefer for row in rows} == choices
            assert sorted(row.revision for row in rows) == [1, 2, 3]
        ended = select(func.count()).select_from(Event).where(Event.job_id == job_id, Event.kind == "review.done")
        assert session.scalar(ended) == 1
        assert jobs.get(session, job_id).state == JobState.RUNNING
