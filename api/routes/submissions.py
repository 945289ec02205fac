"""Asking for work: rounds, samplings, fusions, trainings, evaluations and exports. Each becomes a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response, status
from pydantic import BaseModel

from api.access import needs
from api.deps import CallerDep, IdempotencyKey, Parameters, ServiceDep
from api.openapi import SUBMISSION
from api.routes.jobs import RETRY_AFTER_SECONDS, job_detail
from api.schemas import EstimateOut
from service.jobs.estimates import estimate_of
from service.jobs.specs import (
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    JobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from service.service import Service, create_and_read, estimate_job


class SubmissionParameters(Parameters):
    """`dry_run`: check the request and say what it would take, without doing it."""

    dry_run: bool = False


@dataclass(frozen=True)
class Submission:
    """What comes with every request for a job, and how it is answered."""

    service: Service
    api_key_id: str | None
    idempotency_key: str | None
    dry_run: bool

    def answer(self, spec: JobSpec) -> Response:
        """The new job, at `Location`; with `dry_run` what it would take."""
        if self.dry_run:
            counts, sizes = estimate_job(self.service, spec)
            with self.service.uow.reading() as session:
                return _json(status.HTTP_200_OK, EstimateOut.of(counts, estimate_of(session, spec, sizes)))
        job = create_and_read(self.service, spec, job_detail, self.idempotency_key, self.api_key_id)
        headers = {"Location": f"/jobs/{job.id}", "Retry-After": str(RETRY_AFTER_SECONDS)}
        return _json(status.HTTP_202_ACCEPTED, job, headers)


# a response of its own: what comes with either status is said by SUBMISSION, and FastAPI would check it once more
def _json(status_code: int, body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status_code, headers, media_type="application/json")


async def _submission(
    service: ServiceDep,
    caller: CallerDep,
    parameters: Annotated[SubmissionParameters, Query()],
    idempotency_key: IdempotencyKey = None,
) -> Submission:
    return Submission(service, caller.key_id, idempotency_key, parameters.dry_run)


SubmissionDep = Annotated[Submission, Depends(_submission)]
router = APIRouter(
    tags=["submissions"],
    dependencies=[needs("submit")],
    responses=SUBMISSION,
)


@router.post("/rounds", status_code=status.HTTP_202_ACCEPTED)
def start_rounds(spec: RoundSpec, submission: SubmissionDep) -> Response:
    """Train a model online, for some rounds, on pairs of its own samples. Answers at once; follow `Location`."""
    return submission.answer(spec)


@router.post("/samplings", status_code=status.HTTP_202_ACCEPTED)
def start_sampling(spec: SamplingJobSpec, submission: SubmissionDep) -> Response:
    """Sample a model on prompts; trajectories and item maps are kept, so that samples can be fused later."""
    return submission.answer(spec)


@router.post("/fusions", status_code=status.HTTP_202_ACCEPTED)
def start_fusion(spec: FusionJobSpec, submission: SubmissionDep) -> Response:
    """Fuse stored samples: named pairs, a pair again with other settings, or the best and worst of a sampling."""
    return submission.answer(spec)


@router.post("/trainings", status_code=status.HTTP_202_ACCEPTED)
def start_training(spec: TrainingJobSpec, submission: SubmissionDep) -> Response:
    """Train on stored pairs, also on those that people judged."""
    return submission.answer(spec)


@router.post("/evaluations", status_code=status.HTTP_202_ACCEPTED)
def start_evaluation(spec: EvaluationJobSpec, submission: SubmissionDep) -> Response:
    """Measure models on the same prompts and seeds, with confidence intervals and paired comparison."""
    return submission.answer(spec)


@router.post("/exports", status_code=status.HTTP_202_ACCEPTED)
def start_export(spec: ExportJobSpec, submission: SubmissionDep) -> Response:
    """Write a model's adapter for diffusers, ComfyUI and A1111, or merged; or a job's pairs as a parquet data set."""
    return submission.answer(spec)
