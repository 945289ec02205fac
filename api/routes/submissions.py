"""Asking for work: rounds, samplings, fusions, trainings, evaluations and exports. Each becomes a job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response, status

from api.access import needs
from api.core.estimates import estimate_of
from api.core.service import Service, create_job, estimate_job
from api.core.specs import (
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    JobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from api.deps import CallerDep, IdempotencyKey, Parameters, ServiceDep
from api.openapi import SUBMISSION
from api.routes.jobs import RETRY_AFTER_SECONDS, read_job
from api.schemas import EstimateOut, JobDetail


class SubmissionParameters(Parameters):
    """`dry_run`: check the request and say what it would take, without doing it."""

    dry_run: bool = False


class Submission:
    """What comes with every request for a job, and how it is answered."""

    def __init__(
        self,
        service: ServiceDep,
        caller: CallerDep,
        response: Response,
        parameters: Annotated[SubmissionParameters, Query()],
        idempotency_key: IdempotencyKey = None,
    ) -> None:
        self._service: Service = service
        self._api_key_id = caller.key_id
        self._response, self._dry_run, self._key = response, parameters.dry_run, idempotency_key

    def answer(self, spec: JobSpec) -> JobDetail | EstimateOut:
        """The new job, at `Location`; with `dry_run` what it would take."""
        if self._dry_run:
            self._response.status_code = status.HTTP_200_OK
            counts, sizes = estimate_job(self._service, spec)
            with self._service.uow.reading() as session:
                return EstimateOut.of(counts, estimate_of(session, spec, sizes))
        job_id = create_job(self._service, spec, self._key, self._api_key_id)
        self._response.headers["Location"] = f"/jobs/{job_id}"
        self._response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        return read_job(self._service, job_id)


SubmissionDep = Annotated[Submission, Depends()]
router = APIRouter(
    tags=["submissions"],
    dependencies=[needs("submit")],
    responses=SUBMISSION,
)


@router.post("/rounds", status_code=status.HTTP_202_ACCEPTED, response_model=None)
def start_rounds(spec: RoundSpec, submission: SubmissionDep) -> JobDetail | EstimateOut:
    """Train a model online, for some rounds, on pairs of its own samples. Answers at once; follow `Location`."""
    return submission.answer(spec)


@router.post("/samplings", status_code=status.HTTP_202_ACCEPTED, response_model=None)
def start_sampling(spec: SamplingJobSpec, submission: SubmissionDep) -> JobDetail | EstimateOut:
    """Sample a model on prompts; trajectories and item maps are kept, so that samples can be fused later."""
    return submission.answer(spec)


@router.post("/fusions", status_code=status.HTTP_202_ACCEPTED, response_model=None)
def start_fusion(spec: FusionJobSpec, submission: SubmissionDep) -> JobDetail | EstimateOut:
    """Fuse stored samples: named pairs, a pair again with other settings, or the best and worst of a sampling."""
    return submission.answer(spec)


@router.post("/trainings", status_code=status.HTTP_202_ACCEPTED, response_model=None)
def start_training(spec: TrainingJobSpec, submission: SubmissionDep) -> JobDetail | EstimateOut:
    """Train on stored pairs, also on those that people judged."""
    return submission.answer(spec)


@router.post("/evaluations", status_code=status.HTTP_202_ACCEPTED, response_model=None)
def start_evaluation(spec: EvaluationJobSpec, submission: SubmissionDep) -> JobDetail | EstimateOut:
    """Measure models on the same prompts and seeds, with confidence intervals and paired comparison."""
    return submission.answer(spec)


@router.post("/exports", status_code=status.HTTP_202_ACCEPTED, response_model=None)
def start_export(spec: ExportJobSpec, submission: SubmissionDep) -> JobDetail | EstimateOut:
    """Write a model's adapter for diffusers, ComfyUI and A1111, or merged; or a job's pairs as a parquet data set."""
    return submission.answer(spec)
