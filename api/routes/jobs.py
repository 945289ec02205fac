"""Routes for jobs: status, stages, events, logs, metrics, and the requests that change, continue or delete a job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from enum import StrEnum
from typing import Annotated, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import Field
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.common import convert_page
from api.converters.jobs import event_out, job_detail, job_out, metric_out, pairing_out, stage_out, training_out
from api.deps import (
    CallerDep,
    IdempotencyKey,
    PageParameters,
    Parameters,
    PromptSetFilter,
    ServiceDep,
    TimeParameters,
    is_stopping,
)
from api.openapi import CREATED_JOB, RETRY_AFTER
from api.wire.common import ListOut
from api.wire.jobs import EventOut, JobChange, JobDetail, JobOut, MetricsOut, StageOut
from service import keys
from service.db.queries import jobs, prompt_sets, results, stages, verdicts
from service.db.queries.pages import Page, encode_cursor, number_after
from service.db.tables import Event, Job, Stage
from service.errors import InvalidRequestError, NotFoundError
from service.keys import Caller
from service.service import (
    Service,
    cancel_job,
    continue_job,
    delete_job,
    pause_job,
    raise_rounds,
    resume_job,
    retry_job,
    skip_review,
)
from service.states import JobKind, JobState, StageKind, StageState

RETRY_AFTER_SECONDS = 2
_POLL_SECONDS = 0.2
_KEEP_ALIVE_SECONDS = 15.0
_KEY_CHECK_SECONDS = 5.0
_EVENTS_PER_READ = 200
T = TypeVar("T")

router = APIRouter(prefix="/jobs", tags=["jobs"], dependencies=[require_scope("read")])


class JobListParameters(TimeParameters):
    """Filters of the list of jobs; `origin` selects the retries of a job. `state` and `kind` can be repeated."""

    state: list[JobState] = Field([], max_length=len(JobState))
    kind: list[JobKind] = Field([], max_length=len(JobKind))
    prompt_set: PromptSetFilter = None
    origin: str | None = Field(None, max_length=100)


class StageListParameters(PageParameters):
    """Filters of the list of stages. `with_error` selects those whose last attempt has failed.

    `state` and `kind` can be repeated.
    """

    state: list[StageState] = Field([], max_length=len(StageState))
    kind: list[StageKind] = Field([], max_length=len(StageKind))
    round: int | None = Field(None, ge=0, le=1_000_000)
    with_error: bool = False


Wait = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]


class WaitParameters(Parameters):
    """`wait`: respond when the job has ended or waits for verdicts, or after this many seconds."""

    wait: Wait = 0


class RetryStart(StrEnum):
    """Where a retry starts: as a new job, or in the old one at the stages that have not succeeded."""

    BEGINNING = "beginning"
    FAILED = "failed"


class RetryParameters(Parameters):
    """`from`: where the retry starts."""

    start: RetryStart = Field(RetryStart.BEGINNING, alias="from")


class EventParameters(PageParameters):
    """`wait`: respond when there is an event after the cursor, or after this many seconds."""

    wait: Wait = 0


@router.get("")
def list_jobs(service: ServiceDep, filters: Annotated[JobListParameters, Query()]) -> ListOut[JobOut]:
    """List jobs, newest first.

    A page reads a limited number of rows. If few of them match the filters, it is shorter than `limit`, even empty:
    follow `next_cursor` until `has_more` is false.
    """
    with service.uow.reading() as session:
        set_id = None if filters.prompt_set is None else prompt_sets.id_of(session, filters.prompt_set)
        page: Page[Job] = jobs.page(
            session,
            filters.limit,
            filters.cursor,
            state=filters.state,
            kind=filters.kind,
            prompt_set_id=set_id,
            origin_id=filters.origin,
            created=filters.created,
        )
        running = stages.running_of_jobs(session, [job.id for job in page.rows])
        now = jobs.now(session)
        return convert_page(ListOut[JobOut], page, lambda job: job_out(job, running[job.id], now))


@router.get("/{job_id}", responses={status.HTTP_200_OK: {"headers": {"Retry-After": RETRY_AFTER}}})
async def get_job(
    job_id: str,
    request: Request,
    service: ServiceDep,
    response: Response,
    parameters: Annotated[WaitParameters, Query()],
) -> JobDetail:
    """Return a job, immediately or, with `wait`, when it has ended or waits for verdicts."""

    def is_done(state: JobState) -> bool:
        return state.is_final or state is JobState.WAITING or is_stopping(request)

    if parameters.wait:
        await _poll(parameters.wait, lambda: run_in_threadpool(_state, service, job_id), is_done)

    job = await run_in_threadpool(read_job, service, job_id)
    if not job.state.is_final:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return job


async def _poll(wait_seconds: float, read: Callable[[], Awaitable[T]], is_done: Callable[[T], bool]) -> T:
    """Call `read` until its result is done or the time is up. Returns the last result."""
    deadline = time.monotonic() + wait_seconds
    result = await read()
    while not is_done(result) and time.monotonic() < deadline:
        await asyncio.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        result = await read()
    return result


def _state(service: Service, job_id: str) -> JobState:
    with service.uow.reading() as session:
        return jobs.state_of(session, job_id)


def read_job(service: Service, job_id: str) -> JobDetail:
    """Read the job in a transaction. Raises NotFoundError."""
    with service.uow.reading() as session:
        return view_job(session, job_id)


def view_job(session: Session, job_id: str) -> JobDetail:
    """Read the job in a given session. Raises NotFoundError."""
    view = jobs.get_view(session, job_id)
    is_waiting = view.job.state == JobState.WAITING
    return job_detail(view, verdicts.review_progress(session, job_id) if is_waiting else None)


@router.patch(
    "/{job_id}",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[require_scope("submit")],
    operation_id="change_job",
)
def change(job_id: str, body: JobChange, service: ServiceDep, response: Response) -> JobDetail:
    """Raise the number of rounds of a round job that has succeeded. It continues with the round after its last one.

    The models, samples and pairs are those of a job with this number of rounds from the start. The limits of the
    settings apply to all rounds together. Has no effect if the job has this number of rounds.

    A job that stopped early has the rounds before the stop. It stops again after its next round if the warning sign is
    still there; `stop_when: []` prevents this.
    """
    raise_rounds(service, job_id, body.rounds, body.stop_when)
    response.headers["Location"] = f"/jobs/{job_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return read_job(service, job_id)


@router.delete(
    "/{job_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    dependencies=[require_scope("submit")],
    operation_id="delete_job",
)
def delete(job_id: str, service: ServiceDep) -> None:
    """Delete a job that has ended, with its samples, pairs and their verdicts, models and files.

    409 if the job has not ended, if another job uses its samples, pairs or models, or if an alias refers to one of its
    models; the error lists the first of them. The job and its results are no longer visible; their space is free
    after the next collections. Retries of the job remain, without `origin`.
    """
    delete_job(service, job_id)


@router.post(
    "/{job_id}/cancel",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[require_scope("submit")],
    operation_id="cancel_job",
)
def cancel(job_id: str, service: ServiceDep) -> JobDetail:
    """Cancel a job. It stops within a denoising step or update. Has no effect on a job that has ended."""
    cancel_job(service, job_id)
    return read_job(service, job_id)


@router.post(
    "/{job_id}/pause",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[require_scope("submit")],
    operation_id="pause_job",
)
def pause(job_id: str, service: ServiceDep) -> JobDetail:
    """Pause a job within a denoising step or update. A training keeps its progress. 409 if the job has ended."""
    pause_job(service, job_id)
    return read_job(service, job_id)


@router.post(
    "/{job_id}/resume",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[require_scope("submit")],
    operation_id="resume_job",
)
def resume(job_id: str, service: ServiceDep) -> JobDetail:
    """Resume a paused job. 409 for other jobs."""
    resume_job(service, job_id)
    return read_job(service, job_id)


@router.post(
    "/{job_id}/skip-review",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[require_scope("submit")],
    operation_id="skip_review",
)
def skip(job_id: str, service: ServiceDep) -> JobDetail:
    """End the review of a job that waits for verdicts. It continues without the missing ones. 409 for other jobs."""
    skip_review(service, job_id)
    return read_job(service, job_id)


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    dependencies=[require_scope("submit")],
    operation_id="retry_job",
    responses={status.HTTP_202_ACCEPTED: CREATED_JOB},
)
def retry(
    job_id: str,
    service: ServiceDep,
    caller: CallerDep,
    response: Response,
    parameters: Annotated[RetryParameters, Query()],
    idempotency_key: IdempotencyKey = None,
) -> JobDetail:
    """Retry a failed or cancelled job.

    Creates a new job whose `origin` is the old one. With `from=failed`, no job is created: the old one continues with
    the stages that have not succeeded, and keeps the results of all others; `Idempotency-Key` has no effect.
    """
    new_id = job_id
    if parameters.start is RetryStart.FAILED:
        continue_job(service, job_id)
    else:
        new_id = retry_job(service, job_id, idempotency_key, caller.key_id)
    response.headers["Location"] = f"/jobs/{new_id}"
    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return read_job(service, new_id)


@router.get("/{job_id}/stages")
def list_stages(
    job_id: str, service: ServiceDep, filters: Annotated[StageListParameters, Query()]
) -> ListOut[StageOut]:
    """List the stages of a job, in the order in which free stages are claimed."""
    with service.uow.reading() as session:
        jobs.state_of(session, job_id)
        page: Page[Stage] = stages.page(
            session,
            job_id,
            filters.limit,
            filters.cursor,
            state=filters.state,
            kind=filters.kind,
            round_number=filters.round,
            with_error=filters.with_error,
        )
        return convert_page(ListOut[StageOut], page, stage_out)


@router.get(
    "/{job_id}/events",
    response_model=ListOut[EventOut],
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "Events, as a list or as a stream"},
        204: {"description": "The job has ended and has no event after `Last-Event-ID`; a browser does not reconnect"},
    },
)
async def list_events(
    job_id: str,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    page: Annotated[EventParameters, Query()],
    accept: Annotated[str, Header()] = "*/*",
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> ListOut[EventOut] | Response:
    """List the events of a job, in order.

    `next_cursor` continues after the last event of the response, even if there are no more events yet. `wait` makes
    the request a long poll. `Accept: text/event-stream` streams events until the job has ended; `Last-Event-ID`
    continues after that event, with 204 if there is nothing to follow. The stream can be read by a browser's
    EventSource: events are messages with the event as JSON, and the last one, named `end`, may be ignored.
    """
    await run_in_threadpool(_require_job, service, job_id)
    if "text/event-stream" in accept:
        after = 0 if last_event_id is None else _parse_event_id(last_event_id)
        following, has_ended = await run_in_threadpool(_read_events, service, job_id, after)
        if has_ended and not following and last_event_id is not None:
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        return EventSourceResponse(_stream(request, service, caller, job_id, after))

    def read() -> Page[Event]:
        with service.uow.reading() as session:
            return jobs.events(session, job_id, page.limit, page.cursor)

    events = await _poll(
        page.wait, lambda: run_in_threadpool(read), lambda page: bool(page.rows) or is_stopping(request)
    )
    response = convert_page(ListOut[EventOut], events, event_out)
    cursor = encode_cursor(str(events.rows[-1].id)) if events.rows else page.cursor
    return response.model_copy(update={"next_cursor": cursor or encode_cursor("0")})


def _require_job(service: Service, job_id: str) -> None:
    with service.uow.reading() as session:
        jobs.state_of(session, job_id)


def _parse_event_id(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) >= 1 << 63:
        raise InvalidRequestError.at("/last-event-id", f"expected the id of an event, got {text!r}", "invalid_cursor")
    return int(text)


def _read_events(service: Service, job_id: str, after: int) -> tuple[list[EventOut], bool]:
    """The next events after this one, and whether the job has ended."""
    with service.uow.reading() as session:
        has_ended = jobs.state_of(session, job_id).is_final
        rows = jobs.events(session, job_id, _EVENTS_PER_READ, encode_cursor(str(after))).rows
        return [event_out(row) for row in rows], has_ended


async def _stream(request: Request, service: Service, caller: Caller, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Stream events as they happen, until the job has ended, the service stops, or the caller's key is revoked.

    Events have no name, so that a browser delivers them as messages. After the last event of a job comes one named
    `end`.
    """
    sent_at = time.monotonic()
    checked_at = sent_at
    while not is_stopping(request):
        if caller.key_id is not None and time.monotonic() - checked_at > _KEY_CHECK_SECONDS:
            if not await run_in_threadpool(keys.is_active, service.uow, caller.key_id):
                return
            checked_at = time.monotonic()

        try:
            events, has_ended = await run_in_threadpool(_read_events, service, job_id, after)
        except NotFoundError:  # the job was deleted
            return
        for event in events:
            after = event.id
            yield format_sse_event(data_str=event.model_dump_json(), id=str(event.id))

        if has_ended and len(events) < _EVENTS_PER_READ:
            yield format_sse_event(data_str="{}", event="end")
            return

        if events:
            sent_at = time.monotonic()
        elif time.monotonic() - sent_at > _KEEP_ALIVE_SECONDS:
            sent_at = time.monotonic()
            yield format_sse_event(comment="keep-alive")
        if not events:
            await asyncio.sleep(_POLL_SECONDS)


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
def get_logs(job_id: str, service: ServiceDep) -> StreamingResponse:
    """Return the job's events as text, one per line."""
    _require_job(service, job_id)
    return StreamingResponse(_log_pages(service, job_id), media_type="text/plain")


def _log_pages(service: Service, job_id: str) -> Iterator[str]:
    """The log, page by page, since a job can have a million events."""
    cursor: str | None = None
    while True:
        with service.uow.reading() as session:
            page = jobs.events(session, job_id, _EVENTS_PER_READ, cursor)
        lines = [_log_line(event_out(row)) for row in page.rows]
        yield "".join(f"{line}\n" for line in lines)

        cursor = page.next_cursor
        if cursor is None:
            return


def _log_line(event: EventOut) -> str:
    data = " ".join(f"{name}={value}" for name, value in event.data.items())
    return f"{event.created_at.isoformat(timespec='milliseconds')} {event.kind}: {event.message} {data}".rstrip()


class MetricsParameters(Parameters):
    """A page of metrics: `limit` is a number of rounds."""

    limit: int = Field(50, ge=1, le=200, description="Maximum number of rounds")
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the previous page")


@router.get("/{job_id}/metrics")
def get_job_metrics(job_id: str, service: ServiceDep, parameters: Annotated[MetricsParameters, Query()]) -> MetricsOut:
    """Return mean scores by round, split, scorer and model, the numbers of pairs and statistics of each training.

    In pages of rounds. Round 0 is the model that a round job started from.
    """
    start = 0 if parameters.cursor is None else number_after(parameters.cursor)
    rounds = range(start, start + parameters.limit)
    with service.uow.reading() as session:
        images = jobs.images_per_round(session, job_id)
        has_more = results.are_measured_from(session, job_id, rounds.stop)
        return MetricsOut(
            data=[metric_out(row, images) for row in results.metrics(session, job_id, rounds)],
            pairings=[pairing_out(row) for row in jobs.pairings(session, job_id, rounds)],
            trainings=[training_out(row) for row in results.models_of_job(session, job_id, rounds)],
            has_more=has_more,
            next_cursor=encode_cursor(str(rounds.stop)) if has_more else None,
        )
