"""Routes of the pages of runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.models import display_name
from api.deps import Parameters, ServiceDep
from api.pages.negotiation import PageRoute
from api.pages.queries import FormParameters, filters_of, link, page_links
from api.pages.render import render
from api.pages.reproduction import again_of_job
from api.pages.samples import sample_card
from api.pages.sparklines import Sparkline, sparkline
from api.pages.timeline import Timeline, timeline
from api.routes.jobs import JobListParameters, StageListParameters, list_jobs, list_stages, read_job
from api.routes.results import SampleListParameters, list_samples
from api.wire.jobs import JobDetail, JobOut, ProgressOut
from service.db.queries import jobs, prompt_sets, results
from service.jobs.watching import EVENT_KINDS
from service.service import Service
from service.states import CACHE_KINDS, FINAL_JOB_STATES, JobKind, JobState

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")])
_SPARK_ROUNDS = 40
_WARNINGS = (
    *EVENT_KINDS.values(),
    "round.without_pairs",
    "training.preferred_falls",
    "stage.failed",
    "stage.retried",
    "stage.smaller_batches",
)
_WARNINGS_SHOWN = 5
_EVENTS_SHOWN = 15
_EVENTS_PER_TIMELINE = 1000
_SAMPLES_SHOWN = 48
_ACTIVE = tuple(state for state in JobState if state not in FINAL_JOB_STATES)
_TABS = (
    ("All", ()),
    ("Active", _ACTIVE),
    ("Waiting for review", (JobState.WAITING,)),
    ("Succeeded", (JobState.SUCCEEDED,)),
    ("Failed", (JobState.FAILED,)),
    ("Cancelled", (JobState.CANCELLED,)),
)


class StagePageParameters(FormParameters, StageListParameters):
    """Filters of the page of stages."""

    limit: int = Field(60, ge=1, le=200)


class RunListParameters(FormParameters, JobListParameters):
    """Filters of the list of runs."""

    limit: int = Field(30, ge=1, le=200)


@dataclass(frozen=True)
class Tab:
    """A link to the runs in some states."""

    label: str
    url: str
    is_current: bool


@dataclass(frozen=True)
class RunRow:
    """A run in the list.

    Attributes:
        id: The id of the job.
        title: Its label, or else its kind and the end of its id.
        kind: Its kind.
        state: Its state.
        rounds: Its number of rounds.
        model: The name of the model that it starts from, or the end of that model's id.
        prompts: The name of its prompt set.
        percent: Its progress.
        place: The running stage in words.
        left: The estimated seconds left.
        seconds: How long it ran.
        error: Why it failed.
        spark: Its score by round.
        created_at: When it was created.
    """

    id: str
    title: str
    kind: JobKind
    state: JobState
    rounds: int
    model: str | None
    prompts: str | None
    percent: float
    place: str
    left: float | None
    seconds: float | None
    error: str | None
    spark: Sparkline | None
    created_at: datetime


@router.get("/jobs")
@router.get("/")
def list_runs(request: Request, service: ServiceDep, filters: Annotated[RunListParameters, Query()]) -> Response:
    """Show the runs, newest first; previews, which are made while people look at pairs, only if they are chosen."""
    kinds = filters.kind or [kind for kind in JobKind if kind not in CACHE_KINDS]
    page = list_jobs(service, filters.model_copy(update={"kind": kinds}))
    with service.uow.reading() as session:
        runs = _rows(session, page.data)

    chosen = filters_of(filters)
    states = tuple(filters.state)
    others = {name: value for name, value in chosen.items() if name != "state"}
    return render(
        request,
        "runs.html",
        runs=runs,
        tabs=[Tab(label, link("/", others | {"state": list(of_tab)}), states == of_tab) for label, of_tab in _TABS],
        states=states,
        kinds=list(JobKind),
        chosen_kinds=filters.kind,
        is_filtered=bool(chosen),
        is_live=any(not run.state.is_final for run in runs),
        **page_links("/", chosen, filters.cursor, page.next_cursor),
    )


def _rows(session: Session, page: Iterable[JobOut]) -> list[RunRow]:
    """The rows of the list, with a fixed number of statements."""
    page = list(page)
    sets = prompt_sets.names(session, [job.prompt_set for job in page if job.prompt_set is not None])
    models = results.models(session, [job.model for job in page if job.model is not None])
    rounds = [job.id for job in page if job.kind is JobKind.ROUND]
    metrics = results.recent_metrics(session, rounds, _SPARK_ROUNDS)
    rewards = jobs.rewards(session, rounds)

    rows = []
    for job in page:
        model = models.get(job.model or "")
        row = RunRow(
            id=job.id,
            title=title_of(job),
            kind=job.kind,
            state=job.state,
            rounds=job.rounds,
            model=None if model is None else display_name(model),
            prompts=None if job.prompt_set is None else sets.get(job.prompt_set) or "own prompts",
            percent=job.progress.percent,
            place="" if job.state.is_final else place_of(job.progress),
            left=None if job.state.is_final else job.progress.eta_seconds,
            seconds=seconds_of(job),
            error=None if job.error is None else job.error.message,
            spark=sparkline(metrics.get(job.id, ()), rewards.get(job.id)),
            created_at=job.created_at,
        )
        rows.append(row)
    return rows


def title_of(job: JobOut) -> str:
    """The label of a job, or else its kind and the end of its id."""
    return job.label or f"{job.kind} {job.id[-6:]}"


def seconds_of(job: JobOut) -> float | None:
    """How long an ended job ran."""
    if job.started_at is None or job.finished_at is None:
        return None
    return (job.finished_at - job.started_at).total_seconds()


def place_of(progress: ProgressOut) -> str:
    """The running stage in words, such as "round 2, sample 3 of 10"."""
    parts = []
    if progress.round is not None:
        parts.append(f"round {progress.round}")
    if progress.stage is not None:
        shard = (
            f" {progress.shard + 1} of {progress.shards}" if progress.shard is not None and progress.shards > 1 else ""
        )
        parts.append(f"{progress.stage}{shard}")
    return ", ".join(parts)


class RunParameters(FormParameters, Parameters):
    """`round`: the round whose stages and samples are shown; the current one without it."""

    round: int | None = Field(None, ge=0, le=1_000_000)


@dataclass(frozen=True)
class Control:
    """A button that changes the run.

    Attributes:
        label: Its text.
        url: The path of the request, which is a POST.
        question: What the user confirms first; "" for nothing.
        is_dangerous: Whether it ends something.
    """

    label: str
    url: str
    question: str = ""
    is_dangerous: bool = False


@router.get("/jobs/{job_id}")
def show_run(
    job_id: str, request: Request, service: ServiceDep, parameters: Annotated[RunParameters, Query()]
) -> Response:
    """Show a run: its progress, scores, warnings, and the stages and samples of one of its rounds."""
    job = read_job(service, job_id)
    shown_round = _shown_round(job, parameters.round)
    with service.uow.reading() as session:
        warnings = jobs.last_events(session, job.id, _WARNINGS_SHOWN, _WARNINGS)
        events = jobs.last_events(session, job.id, _EVENTS_SHOWN)
        set_ids = [set_id for set_id in (job.prompt_set, job.held_out_prompt_set) if set_id is not None]
        sets = prompt_sets.names(session, set_ids)
        model = None if job.model is None else results.models(session, [job.model]).get(job.model)

    samples = list_samples(service, SampleListParameters(job=job.id, round=shown_round, limit=_SAMPLES_SHOWN))
    return render(
        request,
        "run.html",
        job=job,
        title=title_of(job),
        place=place_of(job.progress),
        seconds=seconds_of(job),
        model_name=None if model is None else display_name(model),
        sets=sets,
        controls=list(_controls(job)),
        warnings=warnings,
        events=events,
        last_event=events[0].id if events else 0,
        round=shown_round,
        rounds=job.rounds if job.kind is JobKind.ROUND else 0,
        timeline=_timeline(service, job, StagePageParameters(round=shown_round)),
        samples=[sample_card(sample) for sample in samples.data],
        has_more_samples=samples.has_more,
        again=again_of_job(job.kind, job.spec),
    )


@router.get("/jobs/{job_id}/stages")
def show_stages(
    job_id: str, request: Request, service: ServiceDep, filters: Annotated[StagePageParameters, Query()]
) -> Response:
    """Show the stages of a run in pages."""
    job = read_job(service, job_id)
    stages = _timeline(service, job, filters)
    chosen = filters_of(filters)
    path = f"/jobs/{job_id}/stages"
    return render(
        request,
        "stages.html",
        job=job,
        title=title_of(job),
        timeline=stages,
        **page_links(path, chosen, filters.cursor, stages.next_cursor),
    )


def _shown_round(job: JobDetail, wanted: int | None) -> int | None:
    """The round that is shown: the wanted one, or the current one. Jobs of other kinds have no rounds."""
    if wanted is not None or job.kind is not JobKind.ROUND:
        return wanted
    return job.progress.round if job.progress.round is not None else 0


def _timeline(service: Service, job: JobDetail, filters: StagePageParameters) -> Timeline:
    """The timeline of a page of stages."""
    page = list_stages(job.id, service, filters)
    with service.uow.reading() as session:
        events = jobs.events_of_stages(session, [stage.id for stage in page.data], _EVENTS_PER_TIMELINE)
        now = jobs.now(session)
    return timeline(page, events, now)


def _controls(job: JobDetail) -> Iterator[Control]:
    """The buttons for the state of the job."""
    path = f"/jobs/{job.id}"
    match job.state:
        case JobState.QUEUED | JobState.RUNNING:
            yield Control("Pause", f"{path}/pause")
        case JobState.PAUSED | JobState.PAUSING:
            yield Control("Resume", f"{path}/resume")
        case JobState.WAITING:
            question = "Continue without the missing verdicts?"
            yield Control("Continue without review", f"{path}/skip-review", question)
        case JobState.FAILED | JobState.CANCELLED:
            yield Control("Continue", f"{path}/retry?from=failed")
            yield Control("Retry as a new run", f"{path}/retry")
    if not job.state.is_final and job.state is not JobState.CANCELLING:
        yield Control("Cancel", f"{path}/cancel", "Cancel this run?", is_dangerous=True)
