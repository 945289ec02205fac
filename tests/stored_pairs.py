"""Rows of results, as a stage writes them, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.db.clock import now_seconds
from service.db.queries import results, stages
from service.db.tables import Artifact, Pair, Sample
from service.ids import IdKind, new_id
from service.jobs.kinds import RoundSpec
from service.service import Service, create_job
from tests.service import round_body


@dataclass(frozen=True)
class Results:
    """Builds result rows of one stage. Each method takes further columns by name; rows are not inserted."""

    job_id: str
    stage_id: str
    model_id: str | None = None

    @classmethod
    def of_new_job(cls, service: Service) -> Results:
        """Results of the first stage of a new round job of the model `tiny`."""
        job_id = create_job(service, RoundSpec.model_validate(round_body()))
        with service.uow.reading() as session:
            stage_id = stages.of_job(session, job_id)[0].id
            model = results.base_model(session, "tiny")
        assert model is not None
        return cls(job_id, stage_id, model.id)

    def artifact(self, slot: str, **columns: Any) -> Artifact:
        values: dict[str, Any] = {
            "key": f"jobs/{self.job_id}/{slot}",
            "sha256": "0" * 64,
            "size_bytes": 1,
            "media_type": "application/octet-stream",
        }
        values |= columns
        return Artifact(id=new_id(IdKind.ARTIFACT), slot=slot, **(self._common() | values))

    def sample(self, number: int, image: Artifact, **columns: Any) -> Sample:
        values: dict[str, Any] = {
            "round": 1,
            "role": "plain",
            "split": "train",
            "prompt_index": 0,
            "prompt": "a red circle",
            "number": number,
            "seed": number,
            "model_id": self.model_id,
            "image_artifact_id": image.id,
        }
        values |= columns
        return Sample(id=new_id(IdKind.SAMPLE), **(self._common() | values))

    def pair(self, number: int, reference_id: str, base_id: str, **columns: Any) -> Pair:
        values: dict[str, Any] = {
            "round": 1,
            "number": number,
            "prompt_index": 0,
            "prompt": "a red circle",
            "reference_id": reference_id,
            "base_id": base_id,
            "scorer": "brightness",
            "scorer_version": "1",
            "reference_score": 0.3,
            "base_score": 0.1,
            "statistics": {},
        }
        values |= columns
        return Pair(id=new_id(IdKind.PAIR), **(self._common() | values))

    def _common(self) -> dict[str, Any]:
        return {"job_id": self.job_id, "stage_id": self.stage_id, "created_at": now_seconds()}


def add_pairs(service: Service, count: int) -> list[str]:
    """Insert verified pairs of one prompt, each with its three samples. Returns the ids of the pairs."""
    rows = Results.of_new_job(service)
    file = rows.artifact("file")
    samples = [
        rows.sample(number, file, trajectory_artifact_id=file.id, trajectory_row=0) for number in range(3 * count)
    ]
    pairs = []
    for number in range(count):
        reference, base, target = (sample.id for sample in samples[3 * number : 3 * number + 3])
        pairs.append(rows.pair(number, reference, base, target_id=target, adopted=True, target_score=0.2))

    with service.uow.writing() as session:
        results.add_all(session, [file, *samples])
        results.add_all(session, pairs)
    return [pair.id for pair in pairs]
