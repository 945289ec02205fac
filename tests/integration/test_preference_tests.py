"""Preference tests on both databases: raters at once, deletion in batches, and what keeps an evaluation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from service import preference_tests
from service.db.queries import jobs
from service.db.queries import preference_tests as rows
from service.db.tables import Job, PreferenceAnswer
from service.errors import JobInUseError, NotFoundError
from service.jobs.collector import collect
from service.preference_tests import NewTest
from service.service import Service, delete_job
from tests.drawn_results import draw_evaluation
from tests.service import settings_for


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    opened = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=database_url))
    yield opened
    opened.close()


def counts(service: Service, test_id: str) -> tuple[int, int]:
    """The stored number of answers, and the number of rows."""
    query = select(func.count()).select_from(PreferenceAnswer).where(PreferenceAnswer.test_id == test_id)
    with service.uow.reading() as session:
        return rows.get(session, test_id).answers, session.scalar(query) or 0


def test_raters_answer_at_once(service: Service) -> None:
    """Each question twice for each rater, also in the same moment."""
    test = preference_tests.create(service, NewTest(draw_evaluation(service).job_id))
    requests = [*product(("ann", "bob", "cleo"), range(8))] * 2
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(lambda request: preference_tests.answer(service, test.id, request[1], request[0], 2), requests)
        )
    assert counts(service, test.id) == (24, 24)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda request: preference_tests.withdraw(service, test.id, request[1], request[0]), requests))
    assert counts(service, test.id) == (0, 0)


def test_a_test_is_deleted_in_batches(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    test, other = (preference_tests.create(service, NewTest(draw_evaluation(service).job_id)) for _ in range(2))
    for rater, number in product(("ann", "bob"), range(5)):
        preference_tests.answer(service, test.id, number, rater, None)
        preference_tests.answer(service, other.id, number, rater, 1)
    monkeypatch.setattr(preference_tests, "_REMOVED_AT_ONCE", 4)
    preference_tests.delete(service, test.id)
    with pytest.raises(NotFoundError):
        counts(service, test.id)
    assert counts(service, other.id) == (10, 10)
    with service.uow.reading() as session:
        found = preference_tests.results_of(session, rows.get(session, other.id), 0.95)
    assert (found.raters, found.overall.answers, found.positions[1].count) == (2, 10, 10)


def test_an_evaluation_with_a_test_is_neither_deleted_nor_expires(service: Service) -> None:
    drawn = draw_evaluation(service)
    test = preference_tests.create(service, NewTest(drawn.job_id))
    with service.uow.writing() as session:
        session.execute(update(Job).values(finished_at=Job.finished_at - 100 * 24 * 3600))
    settings = service.settings.model_copy(update={"retain_succeeded_days": 1.0})

    with pytest.raises(JobInUseError, match=test.id):
        delete_job(service, drawn.job_id)
    collect(service.uow, service.store, settings)
    with service.uow.reading() as session:
        assert jobs.exists(session, drawn.job_id)

    preference_tests.delete(service, test.id)
    collect(service.uow, service.store, settings)
    with service.uow.reading() as session:
        assert not jobs.exists(session, drawn.job_id)
