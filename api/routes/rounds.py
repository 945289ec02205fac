"""POST /rounds: online training."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response, status

from api.access import needs
from api.core.queries import jobs, results, stages
from api.core.service import create_round, estimate_round
from api.core.specs import RoundSpec
from api.deps import CallerDep, Parameters, ServiceDep
from api.routes.jobs import RETRY_AFTER_SECONDS
from api.schemas import EstimateOut, JobDetail

router = APIRouter(tags=["rounds"], dependencies=[needs("submit")])


class RoundParameters(Parameters):
    """`dry_run`: check the request and say what it would take, without doing it."""

    dry_run: bool = False


@router.post(
    "/rounds",
    status_code=status.HTTP_202_ACCEPTED,
    responses={status.HTTP_200_OK: {"model": EstimateOut, "description": "Dry run"}},
)
def start_rounds(
    spec: RoundSpec,
    service: ServiceDep,
    caller: CallerDep,
    response: Response,
    parameters: Annotated[RoundParameters, Query()],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")] = None,
) -> JobDetail | EstimateOut:
    """Train a model for some rounds on pairs of its own samples. Answers at once; follow the job at `Location`."""
    if parameters.dry_run:
        response.status_code = status.HTTP_200_OK
        return EstimateOut.of(spec, estimate_round(service, spec))
    job_id = create_round(service, spec, idempotency_key, caller.key_id)
    response.headers["Location"] = f"/jobs/{job_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    with service.uow.reading() as session:
        made, last = results.counts(session, job_id), results.last_model(session, job_id)
        of_job = stages.of_job(session, job_id)
        return JobDetail.detailed(jobs.get(session, job_id), of_job, jobs.now(session), made, last)
