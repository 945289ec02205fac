"""Jobs: what was asked for, how far it is, what happened, and how to call it off."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Response, status
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api.access import needs
from api.core.queries import jobs, prompt_sets, results, stages
from api.core.queries.pages import Page
from api.core.service import Service, cancel_job
from api.core.specs import RoundSpec
from api.core.states import JobState
from api.core.tables import Job
from api.deps import PageParameters, Parameters, ServiceDep
from api.schemas import EventOut, JobDetail, JobOut, ListOut, MetricOut, MetricsOut

RETRY_AFTER_SECONDS = 2
_LOOK_SECONDS = 0.2

router = APIRouter(prefix="/jobs", tags=["jobs"], dependencies=[needs("read")])


class JobFilters(PageParameters):
    """Which jobs."""

    state: JobState | None = None


class WaitParameters(Parameters):
    """`wait`: answer when the job has ended, or after that many seconds."""

    wait: float = Field(0, ge=0, le=60, allow_inf_nan=False)


@router.get("")
def list_jobs(service: ServiceDep, filters: Annotated[JobFilters, Query()]) -> ListOut[JobOut]:
    """Jobs, newest first."""
    with service.uow.reading() as session:
        page: Page[Job] = jobs.page(session, filters.limit, filters.cursor, filters.state)
        of_jobs, now = stages.of_jobs(session, [job.id for job in page.rows]), jobs.now(session)
        return ListOut[JobOut].of(page, lambda job: JobOut.of(job, of_jobs[job.id], now))


@router.get("/{job_id}")
async def get_job(
    job_id: str, service: ServiceDep, response: Response, parameters: Annotated[WaitParameters, Query()]
) -> JobDetail:
    """A job, at once or when it has ended."""
    until = time.monotonic() + parameters.wait
    job = await run_in_threadpool(_read, service, job_id)
    while not job.state.is_final and time.monotonic() < until:
        await asyncio.sleep(min(_LOOK_SECONDS, max(0.0, until - time.monotonic())))
        job = await run_in_threadpool(_read, service, job_id)
    if not job.state.is_final:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return job


def _read(service: Service, job_id: str) -> JobDetail:
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        made, last = results.counts(session, job_id), results.last_model(session, job_id)
        return JobDetail.detailed(job, stages.of_job(session, job_id), jobs.now(session), made, last)


@router.post("/{job_id}/cancel", status_code=status.HTTP_202_ACCEPTED, dependencies=[needs("submit")])
def cancel(job_id: str, service: ServiceDep) -> JobDetail:
    """Call a job off. It stops within a step; one that has ended stays as it is."""
    cancel_job(service, job_id)
    return _read(service, job_id)


@router.get("/{job_id}/events")
def list_events(job_id: str, service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[EventOut]:
    """What happened to a job, in order."""
    with service.uow.reading() as session:
        jobs.get(session, job_id)
        return ListOut[EventOut].of(jobs.events(session, job_id, page.limit, page.cursor), EventOut.of)


@router.get("/{job_id}/metrics")
def get_metrics(job_id: str, service: ServiceDep) -> MetricsOut:
    """Mean scores by round, split and scorer. Round 0 is the model that the job started from."""
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        spec = RoundSpec.model_validate(job.spec)
        images = prompt_sets.size(session, job.prompt_set_id) * spec.samples_per_prompt
        return MetricsOut(data=[MetricOut.of(row, images) for row in results.metrics(session, job_id)])
