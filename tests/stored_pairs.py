"""Pairs in the database, as if a round had made them."""

from __future__ import annotations

from service.db.clock import now_seconds
from service.db.queries import results, stages
from service.db.tables import Artifact, Pair, Sample
from service.ids import IdKind, new_id
from service.jobs.kinds import RoundSpec
from service.service import Service, create_job
from tests.service import round_body


def add_pairs(service: Service, count: int) -> list[str]:
    """Insert verified pairs of one prompt, each with its three samples. Returns the ids of the pairs."""
    job_id = create_job(service, RoundSpec.model_validate(round_body()))
    with service.uow.reading() as session:
        stage_id = stages.of_job(session, job_id)[0].id
        model = results.base_model(session, "tiny")
    assert model is not None

    file = Artifact(
        id=new_id(IdKind.ARTIFACT),
        job_id=job_id,
        stage_id=stage_id,
        slot="file",
        key=f"jobs/{job_id}/file",
        sha256="0" * 64,
        size_bytes=1,
        media_type="application/octet-stream",
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
            prompt_index=0,
            prompt="a red circle",
            number=number,
            seed=number,
            model_id=model.id,
            image_artifact_id=file.id,
            trajectory_artifact_id=file.id,
            trajectory_row=0,
            created_at=now_seconds(),
        )
        for number in range(3 * count)
    ]
    pairs = [
        Pair(
            id=new_id(IdKind.PAIR),
            job_id=job_id,
            stage_id=stage_id,
            round=1,
            number=number,
            prompt_index=0,
            prompt="a red circle",
            reference_id=samples[3 * number].id,
            base_id=samples[3 * number + 1].id,
            target_id=samples[3 * number + 2].id,
            adopted=True,
            scorer="brightness",
            scorer_version="1",
            reference_score=0.3,
            base_score=0.1,
            target_score=0.2,
            figures={},
            created_at=now_seconds(),
        )
        for number in range(count)
    ]
    with service.uow.writing() as session:
        results.add_all(session, [file, *samples])
        results.add_all(session, pairs)
    return [pair.id for pair in pairs]
