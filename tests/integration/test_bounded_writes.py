"""The statements of a stage's results do not become more with its rows. Counted, on both databases, at two sizes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries import results, stages
from service.db.tables import Artifact, Pair, Sample, Score
from service.ids import IdKind, new_id
from service.jobs.kinds import RoundSpec
from service.service import Service, create_job
from tests.service import round_body, settings_for
from tests.statements import statements


@pytest.fixture
def service(tmp_path: Path, pipeline: Path, database_url: str) -> Iterator[Service]:
    opened = Service.open(settings_for(tmp_path, pipeline, database_url=database_url))
    yield opened
    opened.close()


def samples_of(service: Service, count: int) -> tuple[Artifact, list[Sample]]:
    """An image, and samples that show it."""
    job_id = create_job(service, RoundSpec.model_validate(round_body()))
    with service.uow.reading() as session:
        stage_id = stages.of_job(session, job_id)[0].id
        model = results.base_model(session, "tiny")
    assert model is not None
    image = Artifact(
        id=new_id(IdKind.ARTIFACT),
        job_id=job_id,
        stage_id=stage_id,
        slot="image",
        key=f"jobs/{job_id}",
        sha256="0" * 64,
        size_bytes=1,
        media_type="image/png",
        created_at=now_seconds(),
    )
    samples = [
        Sample(
            id=new_id(IdKind.SAMPLE),
            job_id=job_id,
            stage_id=stage_id,
            round=1,
            role="plain",
            split="train",
            prompt_index=number,
            prompt="a circle",
            number=0,
            seed=number,
            model_id=model.id,
            image_artifact_id=image.id,
            created_at=now_seconds(),
        )
        for number in range(count)
    ]
    return image, samples


def pairs_of(samples: list[Sample]) -> list[Pair]:
    return [
        Pair(
            id=new_id(IdKind.PAIR),
            job_id=sample.job_id,
            stage_id=sample.stage_id,
            round=1,
            number=sample.prompt_index,
            prompt_index=sample.prompt_index,
            prompt=sample.prompt,
            reference_id=sample.id,
            base_id=sample.id,
            scorer="brightness",
            scorer_version="1",
            reference_score=0.3,
            base_score=0.1,
            figures={},
            created_at=now_seconds(),
        )
        for sample in samples
    ]


def count_of(service: Service, write: Callable[[Session], object]) -> int:
    with service.uow.writing() as session, statements(service.uow.engine) as seen:
        write(session)
    return sum(not statement.startswith("BEGIN") for statement, _ in seen)


def write_results(service: Service, size: int) -> list[int]:
    """The numbers of statements of each kind of write, with `size` rows."""
    image, samples = samples_of(service, size)
    pairs = pairs_of(samples)
    values = [number / 7 for number in range(size)]
    scores = [
        Score(sample_id=sample.id, scorer="brightness", version="1", value=value)
        for sample, value in zip(samples, values, strict=True)
    ]
    decisions: dict[str, dict[str, object]] = {
        pair.id: {"adopted": True, "target_score": value, "figures": {"margin": value}}
        if pair.number % 2
        else {"adopted": False, "why": "the target is not better"}
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
    assert [(pair.adopted, pair.why, pair.target_score) for pair in stored] == [
        (True, None, value) if number % 2 else (False, "the target is not better", None)
        for number, value in enumerate(values)
    ]
    assert stored[1].figures == {"margin": 1 / 7} and stored[0].figures == {}
    return counts


def test_writes_of_results_take_as_many_statements_for_many_rows_as_for_few(service: Service) -> None:
    # the artifact, the samples and their counter; the pairs and theirs; scores twice; two kinds of decisions; a lookup
    assert write_results(service, 6) == write_results(service, 3000) == [3, 2, 1, 1, 2, 1]
