"""Queries over jobs, their events and idempotency keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Table, bindparam, case, func, insert, select, text, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries import prompt_sets, stages, webhooks
from service.db.queries.pages import ALWAYS, ColumnValues, Page, Period, fetch_page, span_of
from service.db.queries.rows import get_row, is_any_of, is_kept, select_by_ids, without_texts
from service.db.queries.stages import RunningStage
from service.db.tables import (
    HAS_BEST_AND_IS_KEPT,
    Event,
    IdempotencyKey,
    Job,
    JobPromptSet,
    JobSource,
    Model,
    Pair,
    Sample,
    Stage,
)
from service.errors import NotFoundError, SourceDeletedError
from service.ids import IdKind, expect, kind_of, new_id
from service.states import (
    FINAL_JOB_STATES,
    MAX_COMPARED_MODELS,
    MIN_COMPARED_MODELS,
    JobKind,
    JobState,
    StageKind,
    WebhookEvent,
)

# Statements that every request for a job runs. They are built once, since building takes about as long as running.
_LAST_MODEL = select(Model.id).where(Model.job_id == Job.id).order_by(Model.round.desc()).limit(1)
_VIEW = (
    select(Job, now_seconds(), _LAST_MODEL.scalar_subquery())
    .where(Job.id == bindparam("job_id"), is_kept(Job))
    .execution_options(populate_existing=True)
)
_QUEUED = select(func.count(), func.count(case((Job.api_key_id == bindparam("api_key_id"), 1)))).where(
    Job.started_at.is_(None),
    Job.state.in_(frozenset(JobState) - FINAL_JOB_STATES),  # uses the index on states, unlike `not_in`
)
PAIRED = "round.paired"
"""The kind of the event that says how many pairs a round has, and which prompts have none."""
_ANNOUNCED_KINDS = frozenset(str(event) for event in WebhookEvent)
_ADD_EVENT = insert(cast(Table, Event.__table__)).values(at=now_seconds()).returning(Event.id)


@dataclass(frozen=True)
class Origin:
    """What a job says about the models that it trained: its seed, and its prompt set."""

    seed: int | None
    prompt_set_id: str | None


@dataclass(frozen=True)
class JobView:
    """A job, the current time of the database, the last model that the job trained, and its running stages."""

    job: Job
    now: float
    last_model_id: str | None
    running: Sequence[RunningStage]


def add(
    session: Session,
    *,
    kind: JobKind,
    spec: dict[str, Any],
    label: str | None,
    priority: int,
    rounds: int,
    model_id: str | None,
    prompt_set_id: str | None,
    held_out_prompt_set_id: str | None,
    origin_id: str | None,
    api_key_id: str | None,
    work_total: float,
) -> Job:
    """Insert a queued job."""
    job = Job(
        id=new_id(IdKind.JOB),
        kind=kind,
        state=JobState.QUEUED,
        label=label,
        priority=priority,
        spec=spec,
        rounds=rounds,
        model_id=model_id,
        prompt_set_id=prompt_set_id,
        held_out_prompt_set_id=held_out_prompt_set_id,
        origin_id=origin_id,
        api_key_id=api_key_id,
        work_total=work_total,
        created_at=now_seconds(),
    )
    session.add(job)
    session.flush()
    return job


def get(session: Session, job_id: str) -> Job:
    """The job. Raises NotFoundError."""
    return get_row(session, Job, IdKind.JOB, job_id)


def existing(session: Session, ids: Collection[str]) -> set[str]:
    """Those of these ids that are jobs."""
    return set() if not ids else set(session.scalars(select(Job.id).where(is_any_of(Job.id, ids), is_kept(Job))))


def by_ids(session: Session, ids: Iterable[str]) -> dict[str, Job]:
    """The jobs with these ids, by id. Unknown ids are left out."""
    return {row.id: row for row in select_by_ids(session, Job, Job.id, ids)}


def labels(session: Session, ids: Iterable[str]) -> dict[str, str]:
    """The labels of these jobs by id, or their kinds and the ends of their ids. Their requests are not read."""
    rows = session.execute(select(Job.id, Job.label, Job.kind).where(is_any_of(Job.id, ids)))
    return {row.id: row.label or _unlabelled(row.kind, row.id) for row in rows}


def label_of(job: Job) -> str:
    """The label of the job, or its kind and the end of its id."""
    return job.label or _unlabelled(job.kind, job.id)


def _unlabelled(kind: str, job_id: str) -> str:
    return f"{kind} {job_id[-6:]}"


def comparable(session: Session, ids: Iterable[str]) -> set[str]:
    """The evaluations among these jobs whose number of models fits a preference test."""
    models = func.json_array_length(Job.spec["models"])
    fits = models.between(MIN_COMPARED_MODELS, MAX_COMPARED_MODELS)
    return set(session.scalars(select(Job.id).where(is_any_of(Job.id, ids), Job.kind == JobKind.EVALUATION, fits)))


def sampling_settings(session: Session, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The sampling settings in the requests of these jobs, by job. Empty for requests without."""
    query = select(Job.id, Job.spec["sampling"]).where(is_any_of(Job.id, ids))
    # the field `sampling` of a fusion is the id of a job
    return {job_id: value if isinstance(value, dict) else {} for job_id, value in session.execute(query)}


def origins(session: Session, ids: Iterable[str]) -> dict[str, Origin]:
    """The origins of models that these jobs trained, by job, without the rest of their requests."""
    query = select(Job.id, Job.spec["seed"], Job.prompt_set_id).where(is_any_of(Job.id, ids))
    return {job_id: Origin(seed, prompt_set_id) for job_id, seed, prompt_set_id in session.execute(query)}


def rewards(session: Session, ids: Iterable[str]) -> dict[str, str | None]:
    """The names of the rewards in the requests of these jobs, by job; None for requests without."""
    query = select(Job.id, Job.spec["reward"]).where(is_any_of(Job.id, ids))
    return {job_id: reward if isinstance(reward, str) else None for job_id, reward in session.execute(query)}


def images_per_round(session: Session, job_id: str) -> int:
    """The samples of each round; 0 for jobs of other kinds. Raises NotFoundError."""
    query = select(Job.kind, Job.prompt_set_id, Job.spec["samples_per_prompt"])
    row = session.execute(query.where(Job.id == expect(IdKind.JOB, job_id), is_kept(Job))).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no job {job_id}")
    kind, prompt_set_id, samples_per_prompt = row
    if kind != JobKind.ROUND or prompt_set_id is None:
        return 0
    return prompt_sets.size(session, prompt_set_id) * int(samples_per_prompt)


def get_view(session: Session, job_id: str) -> JobView:
    """The current state of the job, as responses show it. Raises NotFoundError."""
    row = session.execute(_VIEW, {"job_id": expect(IdKind.JOB, job_id)}).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no job {job_id}")
    job, now, last_model_id = row
    running = [] if job.started_at is None else stages.running_of_jobs(session, [job_id])[job_id]
    return JobView(job, now, last_model_id, running)


def state_of(session: Session, job_id: str) -> JobState:
    """The state of the job, whose request is not read. Raises NotFoundError."""
    state = session.scalar(select(Job.state).where(Job.id == expect(IdKind.JOB, job_id), is_kept(Job)))
    if state is None:
        raise NotFoundError(f"there is no job {job_id}")
    return JobState(state)


def exists(session: Session, job_id: str) -> bool:
    """Whether the job exists."""
    return bool(existing(session, [job_id]))


def lock(session: Session, job_id: str) -> Job:
    """Lock the row of the job until the transaction ends, and read its current state, without its request and result.

    The job must be locked before its stages, so that transactions cannot deadlock. Other transactions can insert rows
    that reference the job while it is locked (key_share).
    """
    query = select(Job).options(*without_texts()).where(Job.id == job_id).with_for_update(key_share=True)
    return session.scalars(query.execution_options(populate_existing=True)).one()


def lock_kept(session: Session, job_id: str) -> Job:
    """Lock the job as `lock` does. Raises NotFoundError if it was deleted."""
    job = lock(session, job_id)
    if job.deleted_at is not None:
        raise NotFoundError(f"there is no job {job_id}")
    return job


def page(
    session: Session,
    limit: int,
    cursor: str | None,
    *,
    state: Sequence[str] = (),
    kind: Sequence[str] = (),
    prompt_set_id: str | None = None,
    origin_id: str | None = None,
    created: Period = ALWAYS,
) -> Page[Job]:
    """Jobs without their requests and results, which can be large, newest first. Filters without a value match all."""
    equal: ColumnValues = {
        Job.state: list(state),
        Job.kind: list(kind),
        Job.prompt_set_id: prompt_set_id,
        Job.origin_id: origin_id,
    }
    query = select(Job).options(*without_texts())
    span = span_of(Job.created_at, created)
    found = fetch_page(session, query, Job.id, limit, cursor, newest_first=True, equal=equal, span=span)

    # deleted jobs are left out afterwards, so that the cost of the page does not depend on their number
    return Page([job for job in found.rows if job.deleted_at is None], found.next_cursor)


def count_queued(session: Session, api_key_id: str | None) -> tuple[int, int]:
    """The number of unfinished jobs that have not started: in total, and of this API key."""
    total, of_key = session.execute(_QUEUED, {"api_key_id": api_key_id}).one()
    return total, of_key


def _rested() -> dict[str, Any]:
    """The values of a job that runs again."""
    seconds = func.coalesce(now_seconds() - Job.rest_since, 0.0)
    return {"rest_seconds": Job.rest_seconds + seconds, "rest_since": None}


def _rests() -> dict[str, Any]:
    """The values of a job that does not run from now on. It may rest already, for another reason."""
    return {"rest_since": func.coalesce(Job.rest_since, now_seconds())}


def start(session: Session, job_id: str) -> None:
    """Set a queued job to running. Does nothing for other jobs."""
    query = update(Job).where(Job.id == job_id, Job.state == JobState.QUEUED)
    values = {"state": JobState.RUNNING, "started_at": now_seconds(), "rest_seconds": 0.0, "rest_since": None}
    session.execute(query.values(values))


def end(session: Session, job_id: str, state: JobState, code: str | None = None, message: str | None = None) -> bool:
    """End the job in `state`. False if it had already ended."""
    query = update(Job).where(Job.id == job_id, Job.state.not_in(FINAL_JOB_STATES)).returning(Job.id)
    values = {"state": state, "finished_at": now_seconds(), "error_code": code, "error_message": message}
    values |= {"trajectories_kept": "all", "events_removed_at": None}  # these settings are applied again
    values |= _rests()
    return session.execute(query.values(values)).first() is not None


def request_cancel(session: Session, job_id: str) -> None:
    """Set an unfinished job to cancelling."""
    query = update(Job).where(Job.id == job_id, Job.state.not_in(FINAL_JOB_STATES))
    session.execute(query.values(state=JobState.CANCELLING, cancel_requested_at=now_seconds()))


def become(session: Session, job_id: str, state: JobState) -> bool:
    """Set the state of the job. False if it has this state already, or has ended."""
    query = update(Job).where(Job.id == job_id, Job.state.not_in((*FINAL_JOB_STATES, state))).returning(Job.id)
    rest = _rests() if state in (JobState.PAUSED, JobState.WAITING) else _rested()
    return session.execute(query.values(state=state, **rest)).first() is not None


def request_pause(session: Session, job_id: str) -> None:
    """Set the job to pausing."""
    query = update(Job).where(Job.id == job_id)
    session.execute(query.values(state=JobState.PAUSING, pause_requested_at=now_seconds()))


def request_resume(session: Session, job_id: str) -> None:
    """Set the job to running, or to queued if it has not started."""
    state = case((Job.started_at.is_(None), JobState.QUEUED), else_=JobState.RUNNING)
    session.execute(update(Job).where(Job.id == job_id).values(state=state, pause_requested_at=None, **_rested()))


def reopen(session: Session, job_id: str) -> None:
    """Set a job that has ended to running, or to queued if it has not started."""
    state = case((Job.started_at.is_(None), JobState.QUEUED), else_=JobState.RUNNING)
    requests = {"cancel_requested_at": None, "pause_requested_at": None}
    outcome = {"finished_at": None, "error_code": None, "error_message": None}
    session.execute(update(Job).where(Job.id == job_id).values(state=state, **requests, **outcome, **_rested()))


def extend(session: Session, job_id: str, rounds: int, spec: dict[str, Any], work: float) -> None:
    """Reopen a round job with a higher number of rounds, its changed request, and this further work."""
    reopen(session, job_id)
    query = update(Job).where(Job.id == job_id)
    session.execute(query.values(rounds=rounds, spec=spec, work_total=Job.work_total + work, stopped=None))


def shorten(
    session: Session, job_id: str, rounds: int, spec: dict[str, Any], work: float, stopped: dict[str, Any]
) -> None:
    """Let a round job end after fewer rounds, with its changed request, without this work, and with the reason."""
    query = update(Job).where(Job.id == job_id)
    session.execute(query.values(rounds=rounds, spec=spec, work_total=Job.work_total - work, stopped=stopped))


def set_best(session: Session, job_id: str, best: dict[str, Any]) -> None:
    """Set the best round of a job."""
    session.execute(update(Job).where(Job.id == job_id).values(best=best))


def best_model_id(session: Session) -> str | None:
    """The model of the best round of the newest run that has one."""
    best = session.scalar(select(Job.best).where(text(HAS_BEST_AND_IS_KEPT)).order_by(Job.id.desc()).limit(1))
    return None if best is None else str(best["model"])


def owners(session: Session, ids: Collection[str]) -> set[str]:
    """The jobs among these ids, and those that the pairs, samples and models among them belong to."""
    by_kind: dict[IdKind | None, set[str]] = {}
    for row_id in ids:
        by_kind.setdefault(kind_of(row_id), set()).add(row_id)

    job_ids = existing(session, by_kind.get(IdKind.JOB, ()))
    for kind, table in ((IdKind.PAIR, Pair), (IdKind.SAMPLE, Sample), (IdKind.MODEL, Model)):
        if kind in by_kind:
            named = select(table.job_id).where(is_any_of(table.id, by_kind[kind]), table.job_id.is_not(None))
            job_ids |= set(session.scalars(named.distinct()))
    return job_ids


def add_sources(session: Session, job: Job, source_ids: Collection[str]) -> None:
    """Record the jobs that this job uses. Raises SourceDeletedError if one, or its origin, was deleted concurrently.

    The inserted references lock these jobs, so that they cannot be deleted between this check and the commit.
    """
    if source_ids:
        rows = [{"job_id": job.id, "source_id": source_id} for source_id in sorted(source_ids)]
        session.execute(insert(JobSource), rows)

    referenced = {*source_ids, *([job.origin_id] if job.origin_id is not None else [])}
    deleted = sorted(referenced - existing(session, referenced))
    if deleted:
        raise SourceDeletedError(f"deleted during the request: {', '.join(deleted)}")


def add_prompt_sets(session: Session, job: Job, set_ids: Collection[str]) -> None:
    """Record the prompt sets that this job uses. One that was deleted concurrently is an IntegrityError."""
    if set_ids:
        rows = [{"job_id": job.id, "prompt_set_id": set_id} for set_id in sorted(set_ids)]
        session.execute(insert(JobPromptSet), rows)


def set_result(session: Session, job_id: str, result: dict[str, Any]) -> None:
    """Store the result of the job."""
    session.execute(update(Job).where(Job.id == job_id).values(result=result))


def add_event(
    session: Session, job_id: str, kind: str, message: str, stage_id: str | None = None, **data: object
) -> int:
    """Add an event to the log of the job, and a delivery for the webhooks that want it. Returns the event's number."""
    session.flush()
    if kind in _ANNOUNCED_KINDS:
        webhooks.announce(session, job_id, kind)
    values = {"job_id": job_id, "stage_id": stage_id, "kind": kind, "message": message, "data": data}
    return session.execute(_ADD_EVENT, values).scalar_one()


def has_event(session: Session, number: int) -> bool:
    """Whether the event exists."""
    return session.get(Event, number) is not None


def events(session: Session, job_id: str, limit: int, cursor: str | None) -> Page[Event]:
    """The log of the job, in order."""
    return fetch_page(session, select(Event).where(Event.job_id == job_id), Event.id, limit, cursor)


def pairings(session: Session, job_id: str, rounds: range) -> list[Event]:
    """The events of the job that say how many pairs these rounds have, by round, without those of version 0.1.0."""
    of_stages = (Stage.job_id == job_id, Stage.kind == StageKind.SELECT, Stage.round.in_(rounds))
    query = select(Event).join(Stage, Stage.id == Event.stage_id).where(*of_stages, Event.kind == PAIRED)
    return [event for event in session.scalars(query.order_by(Event.id)) if "pairs" in event.data]


def last_events(session: Session, job_id: str, limit: int, kinds: Collection[str] = ()) -> list[Event]:
    """The newest events of the job, newest first; those of some kinds if `kinds` names any."""
    query = select(Event).where(Event.job_id == job_id)
    if kinds:
        query = query.where(Event.kind.in_(kinds))
    return list(session.scalars(query.order_by(Event.id.desc()).limit(limit)))


def events_of_stages(session: Session, stage_ids: Collection[str], limit: int) -> list[Event]:
    """The first events of these stages, in order."""
    query = select(Event).where(is_any_of(Event.stage_id, stage_ids))
    return list(session.scalars(query.order_by(Event.id).limit(limit)))


def by_key(session: Session, key: str) -> IdempotencyKey | None:
    """The earlier request with this Idempotency-Key."""
    return session.get(IdempotencyKey, key)


def add_key(session: Session, key: str, fingerprint: str, job_id: str) -> None:
    """Store the request with this Idempotency-Key and the job that it created."""
    session.add(IdempotencyKey(key=key, fingerprint=fingerprint, job_id=job_id, created_at=now_seconds()))
    session.flush()


def now(session: Session) -> float:
    """The current time of the database, in seconds since 1970."""
    return session.scalars(select(now_seconds())).one()
