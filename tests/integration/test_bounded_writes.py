"""The statements of a stage's results do not become more with its rows. Counted, on both databases, at two sizes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from service.db.queries import results
from service.db.tables import Score
from service.service import Service
from tests.service import settings_for
from tests.statements import statements
from tests.stored_pairs import Results


@pytest.fixture
def service(tmp_path: Path, pipeline: Path, database_url: str) -> Iterator[Service]:
    opened = Service.open(settings_for(tmp_path, pipeline, database_url=database_url))
    yield opened
    opened.close()


def count_of(service: Service, write: Callable[[Session], object]) -> int:
    with service.uow.writing() as session, statements(service.uow.engine) as seen:
        write(session)
    return sum(not statement.startswith("BEGIN") for statement, _ in seen)


def write_results(service: Service, size: int) -> list[int]:
    """The numbers of statements of each kind of write, with `size` rows."""
    rows = Results.of_new_job(service)
    image = rows.artifact("image")
    samples = [rows.sample(0, image, prompt_index=index) for index in range(size)]
    pairs = [rows.pair(number, sample.id, sample.id, prompt_index=number) for number, sample in enumerate(samples)]
    values = [number / 7 for number in range(size)]
    scores = [
        Score(sample_id=sample.id, scorer="brightness", version="1", value=value)
        for sample, value in zip(samples, values, strict=True)
    ]
    decisions: dict[str, dict[str, object]] = {
        pair.id: {"adopted": True, "target_score": value, "statistics": {"margin": value}}
        if pair.number % 2
        else {"adopted": False, "reason": "the target is not better"}
        for pair, value in zip(pairs, values, strict=True)
    }

    counts = [
        count_of(service, lambda session: results.add_all(session, [*samples, image])),
        count_of(service, lambda session: results.add_all(session, pairs)),
        count_of(service, lambda session: results.add_scores(session, scores[: size // 2])),
        count_of(service, lambda session: results.add_scores(session, scores)),
        count_of(service, lambda session: results.update_pairs(session, decisions)),
        count_of(service, lambda session: results.scores(session, [sample.id for sample in samples])),
    ]

    # what was written
    with service.uow.reading() as session:
        by_sample = results.scores(session, [sample.id for sample in samples])
        stored = results.pairs(session, [pair.id for pair in pairs])
    assert [[score.value for score in by_sample[sample.id]] for sample in samples] == [[value] for value in values]
    assert [(pair.adopted, pair.reason, pair.target_score) for pair in stored] == [
        (True, None, value) if number % 2 else (False, "the target is not better", None)
        for number, value in enumerate(values)
    ]
    assert stored[1].statistics == {"margin": 1 / 7} and stored[0].statistics == {}
    return counts


def test_writes_of_results_take_as_many_statements_for_many_rows_as_for_few(service: Service) -> None:
    # the artifact, the samples and the sums of the job; the pairs and theirs; scores twice; two kinds of decisions; and
    # a lookup
    assert write_results(service, 6) == write_results(service, 1200) == [3, 2, 1, 1, 2, 1]
