"""Queries over stages: planning, claims, leases, the fence, and how they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Table,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session, aliased

from service.db.clock import now_seconds
from service.db.tables import Job, Model, Stage, StageDependency
from service.errors import LeaseLostError
from service.ids import IdKind, new_id
from service.plan import PlannedStage
from service.states import FINAL_STAGE_STATES, StageKind, StageState, queue_of

_NO_LEASE: Mapping[str, Any] = {"lease_owner": None, "lease_expires_at": None}
_UNHINTED: Mapping[str, Any] = {"free_at": None, "hinted_at": None}
_PATIENCE_SECONDS = 30.0
"""So long a free stage may be passed over by workers that have another model loaded."""
_MOST_PAUSES = 16
"""The pause between two hints of a stage grows up to so many times the first."""
_QUEUED_AGAIN = case((Stage.pause_requested_at.is_(None), StageState.QUEUED), else_=StageState.HELD)
_UNSYNCED = {"synchronize_session": False}
# Statements of every request for a job. They are made once, since to make one takes about as long as to run it; and the
# inserts are the core's: the ORM's would look at each row by itself.
_NOW_IF_FREE = case((bindparam("free_now", type_=Boolean), now_seconds()))
_ZERO: ColumnElement[int] = literal_column("0")
_INSERT = insert(cast(Table, Stage.__table__)).values(
    not_before=now_seconds(),
    created_at=now_seconds(),
    free_at=_NOW_IF_FREE,
    hinted_at=_NOW_IF_FREE,
    lease_epoch=_ZERO,
    progress_done=_ZERO,
    progress_total=_ZERO,
    attempt=_ZERO,
    crash_count=_ZERO,
)
_INSERT_NEEDS = insert(cast(Table, StageDependency.__table__))
_OF_JOB = (
    select(Stage)
    .where(Stage.job_id == bindparam("job_id"))
    .order_by(Stage.number)
    .execution_options(populate_existing=True)
)

Hint = tuple[str, str]
"""A stage's id and its queue."""


class StopRequest(StrEnum):
    """What a running stage's job has been asked for."""

    NONE = "none"
    PAUSE = "pause"
    CANCEL = "cancel"


def add(session: Session, job_id: str, plan: Sequence[PlannedStage], after: int = 0) -> list[Hint]:
    """The planned stages, queued, with their dependencies; their numbers follow on `after`.

    Returns those that are free, marked as hinted now: the caller hints them, or nobody does for a while.
    """
    if not plan:
        return []

    session.flush()
    ids = [new_id(IdKind.STAGE) for _ in plan]
    rows: list[dict[str, Any]] = [
        {
            "id": stage_id,
            "job_id": job_id,
            "number": number,
            "kind": planned.kind,
            "queue": queue_of(planned.kind),
            "round": planned.round,
            "shard": planned.shard,
            "params": planned.params,
            "work": planned.work,
            "state": StageState.WAITING if planned.kind is StageKind.REVIEW else StageState.QUEUED,
            "unmet": len(set(planned.needs)),
            "free_now": not planned.needs and planned.kind is not StageKind.REVIEW,
        }
        for number, (stage_id, planned) in enumerate(zip(ids, plan, strict=True), after + 1)
    ]
    session.execute(_INSERT, rows)

    needs = [
        {"stage_id": stage_id, "needs_id": ids[need]}
        for stage_id, planned in zip(ids, plan, strict=True)
        for need in sorted(set(planned.needs))
    ]
    if needs:
        session.execute(_INSERT_NEEDS, needs)
    return [(row["id"], row["queue"]) for row in rows if row["free_now"]]


def last_number(session: Session, job_id: str) -> int:
    """The number of the job's last stage."""
    return session.scalar(select(func.max(Stage.number)).where(Stage.job_id == job_id)) or 0


def count_shards(session: Session, job_id: str, round_number: int, kind: str) -> int:
    """How many stages of a kind a round has, one of them at least. They are planned together and their shards are
    numbered from 0, so the last one gives the count: one entry of an index, however many there are."""
    of_kind = (Stage.job_id == job_id, Stage.round == round_number, Stage.kind == kind)
    return session.scalars(select(Stage.shard).where(*of_kind).order_by(Stage.shard.desc()).limit(1)).one() + 1


def is_free(stage: type[Stage]) -> ColumnElement[bool]:
    """Queued, due, and all that it needs has succeeded."""
    return and_(stage.state == StageState.QUEUED, stage.unmet == 0, stage.not_before <= now_seconds())


def _is_claimable(stage: type[Stage], queues: Sequence[str] | None) -> ColumnElement[bool]:
    free = is_free(stage)
    return free if queues is None else free & stage.queue.in_(queues)


def any_free(session: Session, queues: Sequence[str] | None = None) -> bool:
    """Whether a worker on these queues (None: on all) could claim something."""
    return session.scalar(select(Stage.id).where(_is_claimable(Stage, queues)).limit(1)) is not None


def first_free(
    session: Session, most: int, queues: Sequence[str] | None = None, prefer_base: str | None = None
) -> list[tuple[str, str]]:
    """Stages that could be claimed, and their jobs: the first ones of the oldest job. None of them is held.

    `queues` narrows the choice. Jobs on the base model `prefer_base` come first, which spares loading another; a stage
    of another job that has been free for _PATIENCE_SECONDS takes its turn among them, so none waits for ever.
    """
    first = [] if prefer_base is None else [_is_put_off(Stage, prefer_base)]
    query = select(Stage.id, Stage.job_id).where(_is_claimable(Stage, queues))
    return [
        (row.id, row.job_id) for row in session.execute(query.order_by(*first, Stage.job_id, Stage.number).limit(most))
    ]


def _is_put_off(stage: type[Stage], prefer_base: str) -> ColumnElement[int]:
    """1 for stages of jobs on another base model, 0 for the others; who has waited long is not put off any more."""
    of_base = select(Job.id).join(Model, Model.id == Job.model_id).where(Model.base == prefer_base)
    free_at = func.coalesce(stage.free_at, stage.not_before)  # nobody marks a stage that only its pause held back
    waited = free_at < now_seconds() - _PATIENCE_SECONDS
    return case((waited | stage.job_id.in_(of_base), 0), else_=1)


def claim(session: Session, stage_id: str, owner: str, lease_seconds: float) -> Stage | None:
    """Take the stage under a lease with a new epoch; None if it is not free, or somebody else has it in hand."""
    mine = aliased(Stage)
    free = select(mine.id).where(mine.id == stage_id, is_free(mine)).with_for_update(skip_locked=True)
    query = (
        update(Stage)
        .where(Stage.id == free.scalar_subquery(), is_free(Stage))
        .values(
            state=StageState.RUNNING,
            lease_owner=owner,
            lease_epoch=Stage.lease_epoch + 1,
            lease_expires_at=now_seconds() + lease_seconds,
            attempt=Stage.attempt + 1,
            progress_done=0,
            progress_total=0,
            progress_at=now_seconds(),
            started_at=now_seconds(),
            error_code=None,
            error_message=None,
        )
        .returning(Stage)
    )
    return session.scalar(query, execution_options=_UNSYNCED)


def _held(stage_id: str, epoch: int) -> tuple[ColumnElement[bool], ...]:
    return Stage.id == stage_id, Stage.lease_epoch == epoch, Stage.state == StageState.RUNNING


def renew_lease(
    session: Session, stage_id: str, epoch: int, lease_seconds: float, done: int, total: int
) -> StopRequest:
    """Renew the lease with the progress made; what is wished of the stage. Raises LeaseLostError."""
    query = update(Stage).where(*_held(stage_id, epoch))
    query = query.values(
        lease_expires_at=now_seconds() + lease_seconds,
        progress_done=done,
        progress_total=total,
        progress_at=case(
            (or_(Stage.progress_done != done, Stage.progress_total != total), now_seconds()), else_=Stage.progress_at
        ),
    )
    row = session.execute(query.returning(Stage.cancel_requested_at, Stage.pause_requested_at)).first()
    if row is None:
        raise LeaseLostError(f"the lease on {stage_id} is lost")
    if row.cancel_requested_at is not None:
        return StopRequest.CANCEL
    return StopRequest.NONE if row.pause_requested_at is None else StopRequest.PAUSE


def require_lease(session: Session, stage_id: str, epoch: int) -> None:
    """Hold the stage until the transaction ends. Raises LeaseLostError."""
    _fenced(session, stage_id, epoch, {})


def save_checkpoint(session: Session, stage_id: str, epoch: int, key: str, sha256: str) -> None:
    """Remember the stage's newest checkpoint; crashes before it no longer count. Raises LeaseLostError."""
    values = {"checkpoint_key": key, "checkpoint_sha256": sha256, "checkpoint_at": now_seconds(), "crash_count": 0}
    _fenced(session, stage_id, epoch, values)


def succeed(session: Session, stage_id: str, epoch: int, steps: int, memory_bytes: int | None) -> bool:
    """The stage has succeeded in so many steps, unless a cancel was asked for before (False). Raises LeaseLostError."""
    values: dict[str, Any] = {"state": StageState.SUCCEEDED, "finished_at": now_seconds(), "memory_bytes": memory_bytes}
    values |= {"progress_done": steps, "progress_total": steps}
    query = update(Stage).where(*_held(stage_id, epoch), Stage.cancel_requested_at.is_(None))
    if session.execute(query.values({**values, **_NO_LEASE}).returning(Stage.id)).first() is not None:
        _meet(session, stage_id)
        return True
    _fenced(session, stage_id, epoch, {})
    return False


def _meet(session: Session, needs_id: str) -> None:
    """The stages that need this one have one thing less to wait for."""
    waiting = select(StageDependency.stage_id).where(StageDependency.needs_id == needs_id)
    query = update(Stage).where(Stage.id.in_(waiting)).values(unmet=Stage.unmet - 1)
    session.execute(query, execution_options=_UNSYNCED)


def is_held(session: Session, stage_id: str, epoch: int) -> bool:
    """Whether the stage runs under the lease of that epoch."""
    return session.scalar(select(Stage.id).where(*_held(stage_id, epoch))) is not None


def has_succeeded(session: Session, stage_id: str, epoch: int) -> bool:
    """Whether the stage has succeeded under the lease of that epoch."""
    query = select(Stage.id).where(Stage.id == stage_id, Stage.lease_epoch == epoch)
    return session.scalar(query.where(Stage.state == StageState.SUCCEEDED)) is not None


def end(session: Session, stage_id: str, epoch: int, state: StageState, code: str, message: str) -> None:
    """The stage ends without success. Raises LeaseLostError."""
    values = {"state": state, "finished_at": now_seconds(), "error_code": code, "error_message": message}
    _fenced(session, stage_id, epoch, {**values, **_NO_LEASE})


def requeue(
    session: Session, stage_id: str, epoch: int, pause_seconds: float, code: str | None, message: str | None
) -> None:
    """Back to the queue, not to be claimed before the pause is over. Raises LeaseLostError."""
    values = {"state": _QUEUED_AGAIN, "not_before": now_seconds() + pause_seconds, **_UNHINTED}
    _fenced(session, stage_id, epoch, {**values, "error_code": code, "error_message": message, **_NO_LEASE})


def give_back(session: Session, stage_id: str, epoch: int) -> None:
    """Back to the queue at once; the attempt does not count, since nothing failed. Raises LeaseLostError."""
    values = {"state": _QUEUED_AGAIN, "not_before": now_seconds(), "attempt": Stage.attempt - 1, **_UNHINTED}
    _fenced(session, stage_id, epoch, {**values, **_NO_LEASE})


def mark_free(session: Session, job_id: str) -> list[Hint]:
    """The stages of the job that are free and were never hinted, which are marked as hinted now."""
    session.flush()
    return _mark(session, Stage.job_id == job_id, Stage.hinted_at.is_(None), is_free(Stage))


def _is_hint_due(stage: type[Stage], pause_seconds: float) -> ColumnElement[bool]:
    """Free, and never hinted or hinted long ago: each pause is as long as all before it, so they double."""
    since = now_seconds() - stage.hinted_at
    grown = or_(since >= stage.hinted_at - stage.free_at, since >= _MOST_PAUSES * pause_seconds)
    return is_free(stage) & or_(stage.hinted_at.is_(None), (since >= pause_seconds) & grown)


def any_hint_due(session: Session, pause_seconds: float) -> bool:
    """Whether a free stage is to be hinted again."""
    return session.scalar(select(Stage.id).where(_is_hint_due(Stage, pause_seconds)).limit(1)) is not None


def mark_hint_due(session: Session, pause_seconds: float) -> list[Hint]:
    """The free stages that are to be hinted again, which are marked as hinted now."""
    unheard = aliased(Stage)  # rows that another transaction holds are passed over: two orders of locks never meet
    found = select(unheard.id).where(_is_hint_due(unheard, pause_seconds)).with_for_update(skip_locked=True)
    return _mark(session, Stage.id.in_(found))


def _mark(session: Session, *which: ColumnElement[bool]) -> list[Hint]:
    values = {"hinted_at": now_seconds(), "free_at": func.coalesce(Stage.free_at, now_seconds())}
    query = update(Stage).where(*which).values(values).returning(Stage.id, Stage.queue)
    return [(stage_id, queue) for stage_id, queue in session.execute(query, execution_options=_UNSYNCED)]


def count_crash(session: Session, stage_id: str, epoch: int, only_expired: bool) -> bool:
    """The worker of this attempt was lost; False, and nothing done, where the lease is over or still good."""
    query = update(Stage).where(*_held(stage_id, epoch))
    if only_expired:  # it may have been renewed since it was looked at
        query = query.where(Stage.lease_expires_at < now_seconds())
    query = query.values(crash_count=Stage.crash_count + 1)
    found = session.execute(query.returning(Stage.id), execution_options=_UNSYNCED)
    return found.first() is not None


def _fenced(session: Session, stage_id: str, epoch: int, values: Mapping[str, Any]) -> None:
    """Write to a stage whose lease is held with that epoch. Raises LeaseLostError."""
    query = update(Stage).where(*_held(stage_id, epoch)).values({"lease_epoch": epoch, **values}).returning(Stage.id)
    if session.execute(query, execution_options=_UNSYNCED).first() is None:
        raise LeaseLostError(f"the lease on {stage_id} is lost")


def get(session: Session, stage_id: str) -> Stage:
    """The stage as it is now."""
    return session.scalars(select(Stage).where(Stage.id == stage_id).execution_options(populate_existing=True)).one()


def expired(session: Session) -> list[Stage]:
    """Running stages whose lease is over."""
    query = select(Stage).where(Stage.state == StageState.RUNNING, Stage.lease_expires_at < now_seconds())
    return list(session.scalars(query.order_by(Stage.id)))


def stuck(session: Session, seconds: float) -> list[Stage]:
    """Running stages that have made no progress for so long."""
    query = select(Stage).where(Stage.state == StageState.RUNNING, Stage.progress_at < now_seconds() - seconds)
    return list(session.scalars(query.order_by(Stage.id)))


def running_under(session: Session, owner_prefix: str) -> list[Stage]:
    """Running stages of the workers whose names begin so."""
    query = select(Stage).where(Stage.state == StageState.RUNNING)
    return list(session.scalars(query.where(Stage.lease_owner.startswith(owner_prefix, autoescape=True))))


def cancel_unfinished(session: Session, job_id: str) -> None:
    """The job's stages that have not begun are cancelled; its running ones are asked to stop."""
    of_job = update(Stage).where(Stage.job_id == job_id).execution_options(**_UNSYNCED)
    cancelled = {"state": StageState.CANCELLED, "finished_at": now_seconds()}
    idle = (StageState.QUEUED, StageState.HELD, StageState.WAITING)
    session.execute(of_job.where(Stage.state.in_(idle)).values(cancelled))
    running = of_job.where(Stage.state == StageState.RUNNING, Stage.cancel_requested_at.is_(None))
    session.execute(running.values(cancel_requested_at=now_seconds()))


def hold(session: Session, job_id: str) -> None:
    """No further stage of the job is claimed; its running ones are asked to stop."""
    of_job = update(Stage).where(Stage.job_id == job_id).execution_options(**_UNSYNCED)
    asked = {"pause_requested_at": now_seconds()}
    session.execute(of_job.where(Stage.state == StageState.QUEUED).values(state=StageState.HELD, **asked))
    session.execute(of_job.where(Stage.state.in_((StageState.RUNNING, StageState.WAITING))).values(asked))


def release(session: Session, job_id: str) -> None:
    """The opposite of `hold`."""
    of_job = update(Stage).where(Stage.job_id == job_id).execution_options(**_UNSYNCED)
    session.execute(of_job.where(Stage.state == StageState.HELD).values(state=StageState.QUEUED, **_UNHINTED))
    session.execute(of_job.where(Stage.pause_requested_at.is_not(None)).values(pause_requested_at=None))


def waits_for_people(session: Session, job_id: str) -> bool:
    """Whether a review is due and nothing else of the job can be done meanwhile."""
    of_job = select(Stage.id).where(Stage.job_id == job_id, Stage.unmet == 0)
    due = of_job.where(Stage.state == StageState.WAITING)
    other = of_job.where(Stage.state == StageState.QUEUED)
    return session.scalar(due.limit(1)) is not None and session.scalar(other.limit(1)) is None


def succeed_reviews(session: Session, job_id: str) -> bool:
    """The reviews that are due are done; whether there were any."""
    query = update(Stage).where(Stage.job_id == job_id, Stage.state == StageState.WAITING, Stage.unmet == 0)
    values = {"state": StageState.SUCCEEDED, "finished_at": now_seconds()}
    done = session.scalars(query.values(values).returning(Stage.id), execution_options=_UNSYNCED).all()
    for stage_id in done:
        _meet(session, stage_id)
    return bool(done)


def states_left(session: Session, job_id: str) -> set[str]:
    """The states of the job's stages that have not ended."""
    query = select(Stage.state).where(Stage.job_id == job_id, Stage.state.not_in(FINAL_STAGE_STATES))
    return set(session.scalars(query.distinct()))


def of_job(session: Session, job_id: str) -> list[Stage]:
    """The job's stages as they are now, in order of their numbers."""
    return list(session.scalars(_OF_JOB, {"job_id": job_id}))


def of_jobs(session: Session, job_ids: Sequence[str]) -> dict[str, list[Stage]]:
    """The stages of several jobs, by job."""
    found: dict[str, list[Stage]] = {job_id: [] for job_id in job_ids}
    for stage in session.scalars(select(Stage).where(Stage.job_id.in_(job_ids)).order_by(Stage.number)):
        found[stage.job_id].append(stage)
    return found
