"""Queries over stages: planning, leases, the fence, and how they end. Claims are in `free_stages`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Row,
    Table,
    Update,
    and_,
    bindparam,
    case,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.orm import Session, aliased

from service.db.clock import now_seconds
from service.db.queries.pages import ColumnValues, Page, fetch_page, first_of
from service.db.queries.rows import UNSYNCED, insert_rows, is_any_of
from service.db.tables import (
    HAS_ENDED,
    HAS_FAILED_ATTEMPT,
    IS_RUNNING,
    IS_UNCOUNTED,
    IS_UNFINISHED,
    Job,
    Model,
    Stage,
    StageDependency,
)
from service.errors import LeaseLostError
from service.ids import IdKind, new_id
from service.plan import PlannedStage
from service.queue import Hint
from service.states import FINAL_STAGE_STATES, QueueName, StageKind, StageState, queue_of

_NO_LEASE: Mapping[str, Any] = {"lease_owner": None, "lease_expires_at": None}
_NO_HINT: Mapping[str, Any] = {"free_at": None, "hinted_at": None}
_QUEUED_OR_HELD = case((Stage.pause_requested_at.is_(None), StageState.QUEUED), else_=StageState.HELD)
_COUNTED = (Stage.id, Stage.job_id, Stage.round, Stage.attempt, Stage.work, Stage.started_at, Stage.state)
_Counted = Row[str, str, int, int, float, float | None, str]
_STAGES = cast(Table, Stage.__table__)
_DEPENDENCIES = cast(Table, StageDependency.__table__)
_ZERO: ColumnElement[int] = literal_column("0")
_WITH_JOB = select(Stage, Job).join(Job, Job.id == Stage.job_id).where(Stage.id == bindparam("stage_id"))
# States as literals, since partial indexes are not used for bound parameters.
_RUNNING: ColumnElement[str] = literal_column(f"'{StageState.RUNNING}'")
_LAST_SHARD = (
    select(Stage.shard)
    .where(Stage.job_id == bindparam("job_id"), Stage.round == bindparam("round"), Stage.kind == bindparam("kind"))
    .order_by(Stage.shard.desc())
    .limit(1)
)


@dataclass(frozen=True)
class RunningStage:
    """A running stage, as its job shows it.

    Attributes:
        kind: Its kind.
        round: Its round.
        shard: Its index among the stages of this kind and round.
        shards: Their number.
        work: Its expected work in U-Net evaluations.
        attempt: The number of this attempt, from 1.
        done: Completed steps.
        total: All steps.
    """

    kind: str
    round: int
    shard: int
    shards: int
    work: float
    attempt: int
    done: int
    total: int


class StopRequest(StrEnum):
    """Whether the job of a running stage was asked to stop."""

    NONE = "none"
    PAUSE = "pause"
    CANCEL = "cancel"


def add(session: Session, job_id: str, plan: Sequence[PlannedStage], after: int = 0) -> list[Hint]:
    """Insert the planned stages and their dependencies.

    Args:
        session: The transaction.
        job_id: The job.
        plan: The stages.
        after: The number of the job's last stage; the new numbers follow it.

    Returns:
        Hints for the free stages, which are marked as hinted. The caller must send them.
    """
    if not plan:
        return []

    # 1. the stages
    job = session.get_one(Job, job_id)
    bases = _bases_of(session, job, plan)
    ids = [new_id(IdKind.STAGE) for _ in plan]
    rows: list[dict[str, Any]] = [
        {
            "id": stage_id,
            "job_id": job_id,
            "number": number,
            "kind": planned.kind,
            "queue": queue_of(planned.kind),
            "fair_key": job.api_key_id or "",
            "base": base,
            "rank": -job.priority,
            "round": planned.round,
            "shard": planned.shard,
            "params": planned.params,
            "work": planned.work,
            "state": StageState.WAITING if planned.kind is StageKind.REVIEW else StageState.QUEUED,
            "unmet": len(set(planned.needs)),
            "free_now": not planned.needs and planned.kind is not StageKind.REVIEW,
        }
        for number, (stage_id, planned, base) in enumerate(zip(ids, plan, bases, strict=True), after + 1)
    ]
    insert_rows(session, _STAGES, rows, _of_new_stage)

    # 2. their dependencies
    dependencies: list[dict[str, str]] = []
    for stage_id, planned in zip(ids, plan, strict=True):
        dependencies += [{"stage_id": stage_id, "needs_id": ids[index]} for index in sorted(set(planned.needs))]
    if dependencies:
        insert_rows(session, _DEPENDENCIES, dependencies, _nothing)
    return [(row["id"], row["queue"]) for row in rows if row["free_now"]]


def _bases_of(session: Session, job: Job, plan: Sequence[PlannedStage]) -> list[str]:
    """The base model that each stage loads; "" if none.

    An evaluation's stages name their models; the others use the job's model.
    """
    loaded = [_model_of(job, planned) for planned in plan]
    named = {model_id for model_id in loaded if model_id is not None}
    rows = session.execute(select(Model.id, Model.base).where(is_any_of(Model.id, named)))
    bases = {row.id: row.base for row in rows}
    return ["" if model_id is None else bases[model_id] for model_id in loaded]


def _model_of(job: Job, planned: PlannedStage) -> str | None:
    if queue_of(planned.kind) is QueueName.CPU:
        return None
    model_id: str | None = planned.params.get("model", job.model_id)
    return model_id


def _of_new_stage(row: Mapping[str, ColumnElement[Any]]) -> dict[str, ColumnElement[Any]]:
    now_if_free = case((row["free_now"], now_seconds()))
    return {
        "not_before": now_seconds(),
        "created_at": now_seconds(),
        "free_at": now_if_free,
        "hinted_at": now_if_free,
        "lease_epoch": _ZERO,
        "progress_done": _ZERO,
        "progress_total": _ZERO,
        "attempt": _ZERO,
        "crash_count": _ZERO,
        "failure_count": _ZERO,
    }


def _nothing(_row: Mapping[str, ColumnElement[Any]]) -> dict[str, ColumnElement[Any]]:
    return {}


def last_number(session: Session, job_id: str) -> int:
    """The number of the job's last stage."""
    return session.scalar(select(func.max(Stage.number)).where(Stage.job_id == job_id)) or 0


def count_shards(session: Session, job_id: str, round_number: int, kind: str) -> int:
    """The number of stages of a kind in a round that has at least one.

    Shards are planned together and numbered from 0, so the last one gives the number with one index lookup.
    """
    last = session.execute(_LAST_SHARD, {"job_id": job_id, "round": round_number, "kind": kind})
    return int(last.scalar_one()) + 1


def set_summary(session: Session, stage_id: str, summary: dict[str, Any]) -> None:
    """Set the summary of the stage, for the stage that joins all shards."""
    query = update(Stage).where(Stage.id == stage_id).values(summary=summary)
    session.execute(query, execution_options=UNSYNCED)


def summaries(session: Session, job_id: str, round_number: int, kind: str) -> list[dict[str, Any] | None]:
    """The summaries of a round's stages of a kind, by shard. None for a stage without one."""
    query = select(Stage.summary).where(Stage.job_id == job_id, Stage.round == round_number, Stage.kind == kind)
    return list(session.scalars(query.order_by(Stage.shard)))


def _held(stage_id: str, epoch: int) -> tuple[ColumnElement[bool], ...]:
    return Stage.id == stage_id, Stage.lease_epoch == epoch, Stage.state == StageState.RUNNING


def renew_lease(
    session: Session, stage_id: str, epoch: int, lease_seconds: float, done: int, total: int
) -> StopRequest:
    """Renew the lease and record progress. Returns whether the job was asked to stop. Raises LeaseLostError."""
    query = (
        update(Stage)
        .where(*_held(stage_id, epoch))
        .values(lease_expires_at=now_seconds() + lease_seconds, progress_done=done, progress_total=total)
        .returning(Stage.cancel_requested_at, Stage.pause_requested_at)
    )
    return _stop_request(stage_id, session.execute(query).first())


def stop_request(session: Session, stage_id: str, epoch: int) -> StopRequest:
    """Whether the job was asked to stop, without a write. Raises LeaseLostError."""
    query = select(Stage.cancel_requested_at, Stage.pause_requested_at).where(*_held(stage_id, epoch))
    return _stop_request(stage_id, session.execute(query).first())


def _stop_request(stage_id: str, row: Row[float | None, float | None] | None) -> StopRequest:
    """The request in the times of a cancel and of a pause; without a row the lease is lost."""
    if row is None:
        raise LeaseLostError(f"the lease on {stage_id} is lost")

    if row.cancel_requested_at is not None:
        return StopRequest.CANCEL
    return StopRequest.NONE if row.pause_requested_at is None else StopRequest.PAUSE


def require_lease(session: Session, stage_id: str, epoch: int) -> None:
    """Lock the stage until the transaction ends. Raises LeaseLostError."""
    _fenced(session, stage_id, epoch, {})


def save_checkpoint(session: Session, stage_id: str, epoch: int, key: str, sha256: str, size_bytes: int) -> None:
    """Store the checkpoint of the stage and reset its counts of crashes and failures. Raises LeaseLostError.

    The row of the job must be locked.
    """
    replaced_bytes = session.scalar(select(Stage.checkpoint_bytes).where(Stage.id == stage_id)) or 0
    values = {
        "checkpoint_key": key,
        "checkpoint_sha256": sha256,
        "checkpoint_bytes": size_bytes,
        "checkpoint_at": now_seconds(),
    }
    stage = _fenced(session, stage_id, epoch, {**values, "crash_count": 0, "failure_count": 0})

    job = update(Job).where(Job.id == stage.job_id)
    total = Job.storage_bytes + size_bytes - replaced_bytes
    session.execute(job.values(storage_bytes=total), execution_options=UNSYNCED)


def succeed(session: Session, stage_id: str, epoch: int, steps: int, memory_bytes: int | None) -> bool:
    """End the stage with success. False, without a change, if a cancel was requested. Raises LeaseLostError."""
    values: dict[str, Any] = {
        "state": StageState.SUCCEEDED,
        "finished_at": now_seconds(),
        "memory_bytes": memory_bytes,
        "progress_done": steps,
        "progress_total": steps,
        "is_counted": True,
        **_NO_LEASE,
    }
    query = update(Stage).where(*_held(stage_id, epoch), Stage.cancel_requested_at.is_(None))
    ended = session.execute(query.values(values).returning(*_COUNTED)).first()
    if ended is not None:
        _count_in_job(session, [ended], ended.work)
        _meet_dependencies(session, stage_id)
        return True

    _fenced(session, stage_id, epoch, {})
    return False


def _count_in_job(session: Session, ended: Sequence[_Counted], work: float = 0) -> None:
    """Update the running sums of a job after attempts of its stages have ended.

    Args:
        session: The transaction.
        ended: The stages, at least one, all of the same job.
        work: The work of those that have succeeded.
    """
    attempts = max(stage.attempt for stage in ended)
    last_round = max((stage.round for stage in ended if stage.started_at is not None), default=None)
    sums: dict[str, Any] = {
        "work_done": Job.work_done + work,
        "attempts": case((Job.attempts < attempts, attempts), else_=Job.attempts),
    }
    if last_round is not None:
        is_later = or_(Job.last_round.is_(None), Job.last_round < last_round)
        sums["last_round"] = case((is_later, last_round), else_=Job.last_round)
    session.execute(update(Job).where(Job.id == ended[0].job_id).values(sums), execution_options=UNSYNCED)


def uncounted_jobs(session: Session, limit: int) -> list[str]:
    """At most `limit` jobs with stages that have ended and that the running sums do not include."""
    return list(session.scalars(select(Stage.job_id).where(text(IS_UNCOUNTED)).distinct().limit(limit)))


def count_missed(session: Session, job_id: str) -> int:
    """Include such stages of the job in its running sums. Returns their number. The row of the job must be locked."""
    missed = update(Stage).where(Stage.job_id == job_id, text(IS_UNCOUNTED)).values(is_counted=True)
    rows = session.execute(missed.returning(*_COUNTED), execution_options=UNSYNCED).all()
    if rows:
        _count_in_job(session, rows, sum(row.work for row in rows if row.state == StageState.SUCCEEDED))
    return len(rows)


def _meet_dependencies(session: Session, succeeded_id: str) -> None:
    """Decrement the unmet dependencies of the stages that need this one."""
    dependents = select(StageDependency.stage_id).where(StageDependency.needs_id == succeeded_id)
    query = update(Stage).where(Stage.id.in_(dependents)).values(unmet=Stage.unmet - 1)
    session.execute(query, execution_options=UNSYNCED)


def is_held(session: Session, stage_id: str, epoch: int) -> bool:
    """Whether the stage runs under the lease with this epoch."""
    return session.scalar(select(Stage.id).where(*_held(stage_id, epoch))) is not None


def has_succeeded(session: Session, stage_id: str, epoch: int) -> bool:
    """Whether the stage has succeeded under the lease with this epoch."""
    query = select(Stage.id).where(Stage.id == stage_id, Stage.lease_epoch == epoch)
    return session.scalar(query.where(Stage.state == StageState.SUCCEEDED)) is not None


def end(session: Session, stage_id: str, epoch: int, state: StageState, code: str, message: str) -> None:
    """End the stage without success. Raises LeaseLostError."""
    error = {"error_code": code, "error_message": message}
    values = {"state": state, "finished_at": now_seconds(), "is_counted": True, **error, **_NO_LEASE}
    _count_in_job(session, [_fenced(session, stage_id, epoch, values)])


def requeue(
    session: Session, stage_id: str, epoch: int, pause_seconds: float, code: str | None, message: str | None
) -> None:
    """Requeue the stage after a failed attempt. It cannot be claimed before the pause ends. Raises LeaseLostError."""
    values = {"state": _QUEUED_OR_HELD, "not_before": now_seconds() + pause_seconds, **_NO_HINT}
    values |= {"error_code": code, "error_message": message, **_NO_LEASE}
    _count_in_job(session, [_fenced(session, stage_id, epoch, values)])


def give_back(session: Session, stage_id: str, epoch: int) -> None:
    """Requeue the stage at once, without counting the attempt, since nothing failed. Raises LeaseLostError."""
    values = {"state": _QUEUED_OR_HELD, "not_before": now_seconds(), "attempt": Stage.attempt - 1, **_NO_HINT}
    _count_in_job(session, [_fenced(session, stage_id, epoch, {**values, **_NO_LEASE})])


def count_crash(session: Session, stage_id: str, epoch: int, only_expired: bool) -> bool:
    """Increment the crash count of the stage.

    Args:
        session: The transaction.
        stage_id: The stage.
        epoch: The epoch of the lost worker's lease.
        only_expired: Only if the lease has expired; the worker may have renewed it meanwhile.

    Returns:
        False, without a change, if the lease has ended or was renewed.
    """
    query = update(Stage).where(*_held(stage_id, epoch))
    if only_expired:
        query = query.where(Stage.lease_expires_at < now_seconds())
    query = query.values(crash_count=Stage.crash_count + 1)
    return session.execute(query.returning(Stage.id), execution_options=UNSYNCED).first() is not None


def count_failure(session: Session, stage_id: str, epoch: int) -> None:
    """Increment the count of failed attempts of the stage. Raises LeaseLostError."""
    _fenced(session, stage_id, epoch, {"failure_count": Stage.failure_count + 1})


def _fenced(session: Session, stage_id: str, epoch: int, values: Mapping[str, Any]) -> _Counted:
    """Update a stage under the lease with this epoch (the fence). Returns _COUNTED of it. Raises LeaseLostError."""
    query = update(Stage).where(*_held(stage_id, epoch)).values({"lease_epoch": epoch, **values}).returning(*_COUNTED)
    row = session.execute(query, execution_options=UNSYNCED).first()
    if row is None:
        raise LeaseLostError(f"the lease on {stage_id} is lost")
    return row


def get(session: Session, stage_id: str) -> Stage:
    """The current state of the stage."""
    return session.scalars(select(Stage).where(Stage.id == stage_id).execution_options(populate_existing=True)).one()


def get_with_job(session: Session, stage_id: str) -> tuple[Stage, Job]:
    """The current state of the stage and of its job."""
    stage, job = session.execute(_WITH_JOB, {"stage_id": stage_id}).one()
    return stage, job


def expired(session: Session) -> list[Stage]:
    """Running stages whose lease has expired."""
    running = select(Stage).where(text(IS_RUNNING))
    # sorted here: the database would read all stages in the order of their ids
    return sorted(session.scalars(running.where(Stage.lease_expires_at < now_seconds())), key=attrgetter("id"))


def running_under(session: Session, owner_prefix: str) -> list[Stage]:
    """Running stages of the workers whose names start with `owner_prefix`."""
    query = select(Stage).where(text(IS_RUNNING))
    return list(session.scalars(query.where(Stage.lease_owner.startswith(owner_prefix, autoescape=True))))


# All stages of a job: one statement, which writes each stage at most once. A job can have thousands in a round.


def cancel_unfinished(session: Session, job_id: str) -> None:
    """Cancel the stages of the job that have not started, and request its running stages to cancel."""
    is_running = Stage.state == StageState.RUNNING
    values: dict[str, Any] = {
        "state": case((is_running, Stage.state), else_=StageState.CANCELLED),
        "finished_at": case((is_running, Stage.finished_at), else_=now_seconds()),
        "is_counted": case((is_running, false()), else_=true()),
        "cancel_requested_at": case((is_running, func.coalesce(Stage.cancel_requested_at, now_seconds()))),
    }
    session.execute(_unfinished_of(job_id).values(values), execution_options=UNSYNCED)


def hold(session: Session, job_id: str) -> None:
    """Hold the queued stages of the job, and request its running stages to pause."""
    values = {
        "state": case((Stage.state == StageState.QUEUED, StageState.HELD), else_=Stage.state),
        "pause_requested_at": now_seconds(),
    }
    on_hold = _unfinished_of(job_id).where(Stage.pause_requested_at.is_(None))
    session.execute(on_hold.values(values), execution_options=UNSYNCED)


def release(session: Session, job_id: str) -> list[Hint]:
    """Queue the held stages of the job. The inverse of `hold`.

    Returns:
        Hints for those that are free, which are marked as hinted. The caller must send them.
    """
    was_held = Stage.state == StageState.HELD
    values: dict[str, Any] = {
        "state": case((was_held, StageState.QUEUED), else_=Stage.state),
        "pause_requested_at": None,
        "free_at": case((was_held, _now_if_free(Stage.not_before <= now_seconds())), else_=Stage.free_at),
        "hinted_at": case((was_held, _now_if_free(Stage.not_before <= now_seconds())), else_=Stage.hinted_at),
    }
    held = _unfinished_of(job_id).where(Stage.pause_requested_at.is_not(None))
    return _queued(session, held.values(values))[1]


def reopen(session: Session, job_id: str) -> tuple[int, list[Hint]]:
    """Queue the failed and cancelled stages of the job, without their counts of failures.

    Returns:
        Their number, and hints for those that are free, which are marked as hinted. The caller must send the hints.
    """
    is_review = Stage.kind == StageKind.REVIEW
    now_if_free = case((is_review, None), else_=_now_if_free())

    values: dict[str, Any] = {
        "state": case((is_review, StageState.WAITING), else_=StageState.QUEUED),
        "not_before": now_seconds(),
        "finished_at": None,
        "is_counted": False,
        "cancel_requested_at": None,
        "pause_requested_at": None,
        "crash_count": 0,
        "failure_count": 0,
        "error_code": None,
        "error_message": None,
        "free_at": now_if_free,
        "hinted_at": now_if_free,
    }

    ended = update(Stage).where(Stage.job_id == job_id, text(HAS_ENDED), Stage.state != StageState.SUCCEEDED)
    return _queued(session, ended.values(values))


def _unfinished_of(job_id: str) -> Update:
    return update(Stage).where(Stage.job_id == job_id, text(IS_UNFINISHED))


def _now_if_free(*conditions: ColumnElement[bool]) -> ColumnElement[float | None]:
    """The time from which a stage that is queued now is free; NULL if it waits for others."""
    return case((and_(Stage.unmet == 0, *conditions), now_seconds()))


def _queued(session: Session, query: Update) -> tuple[int, list[Hint]]:
    """Run an update that queues stages. Returns the number of its rows, and hints for those marked as hinted."""
    columns = (Stage.id, Stage.queue, Stage.state, Stage.hinted_at)
    rows = session.execute(query.returning(*columns), execution_options=UNSYNCED).all()
    return len(rows), [
        (row.id, row.queue) for row in rows if row.state == StageState.QUEUED and row.hinted_at is not None
    ]


def waits_for_people(session: Session, job_id: str) -> bool:
    """Whether a review is due and no other stage of the job can run."""
    of_job = select(Stage.id).where(Stage.job_id == job_id, Stage.unmet == 0)
    due = of_job.where(Stage.state == StageState.WAITING)
    other = of_job.where(Stage.state == StageState.QUEUED)
    return session.scalar(due.limit(1)) is not None and session.scalar(other.limit(1)) is None


def succeed_reviews(session: Session, job_id: str) -> bool:
    """End the due reviews of the job with success. False if none was due."""
    query = update(Stage).where(Stage.job_id == job_id, Stage.state == StageState.WAITING, Stage.unmet == 0)
    values = {"state": StageState.SUCCEEDED, "finished_at": now_seconds(), "is_counted": True}
    reviews = session.execute(query.values(values).returning(*_COUNTED), execution_options=UNSYNCED).all()
    if reviews:
        _count_in_job(session, reviews, sum(review.work for review in reviews))
    for review in reviews:
        _meet_dependencies(session, review.id)
    return bool(reviews)


def states_left(session: Session, job_id: str) -> set[str]:
    """The states of the unfinished stages of the job. Each state is one index lookup."""
    unfinished = [state for state in StageState if state not in FINAL_STAGE_STATES]
    of_job = exists().where(Stage.job_id == job_id, text(IS_UNFINISHED))
    row = session.execute(select(*(of_job.where(Stage.state == state) for state in unfinished))).one()
    return {state for state, is_present in zip(unfinished, row, strict=True) if is_present}


def of_job(session: Session, job_id: str) -> list[Stage]:
    """The current state of the job's stages, by number."""
    query = select(Stage).where(Stage.job_id == job_id).order_by(Stage.number)
    return list(session.scalars(query, execution_options={"populate_existing": True}))


def params_of_job(session: Session, job_id: str) -> list[dict[str, Any]]:
    """The parameters of the job's stages, by number."""
    return list(session.scalars(select(Stage.params).where(Stage.job_id == job_id).order_by(Stage.number)))


def running_of_jobs(session: Session, job_ids: Sequence[str]) -> dict[str, list[RunningStage]]:
    """The running stages of these jobs, by job and number: no more than there are workers."""
    shard = aliased(Stage)
    same = (shard.job_id == Stage.job_id, shard.round == Stage.round, shard.kind == Stage.kind)
    last_shard = select(shard.shard).where(*same).order_by(shard.shard.desc()).limit(1).scalar_subquery()
    columns = (Stage.kind, Stage.round, Stage.shard, last_shard + 1, Stage.work, Stage.attempt)
    query = select(Stage.job_id, *columns, Stage.progress_done, Stage.progress_total)
    query = query.where(Stage.state == _RUNNING, is_any_of(Stage.job_id, job_ids)).order_by(Stage.job_id, Stage.number)

    by_job: dict[str, list[RunningStage]] = {job_id: [] for job_id in job_ids}
    for job_id, *values in session.execute(query):
        by_job[job_id].append(RunningStage(*values))
    return by_job


def page(
    session: Session,
    job_id: str,
    limit: int,
    cursor: str | None,
    *,
    state: Sequence[str] = (),
    kind: Sequence[str] = (),
    round_number: int | None = None,
    with_error: bool = False,
) -> Page[Stage]:
    """The stages of a job, by number. Filters without a value match all stages.

    `with_error` selects the stages whose last attempt has failed and that no later attempt has replaced yet, without
    cancelled ones.
    """
    query = select(Stage)
    if with_error:
        query = query.where(text(HAS_FAILED_ATTEMPT))
    equal: ColumnValues = {Stage.job_id: job_id, Stage.kind: list(kind), Stage.round: round_number}
    if not state:
        return fetch_page(session, query, Stage.number, limit, cursor, equal=equal)

    # a page for each state, since an index has the stages of each state by number
    pages = []
    for value in state:
        of_state = query.where(text(_part_of(value)))
        in_state = {**equal, Stage.state: value}
        pages.append(fetch_page(session, of_state, Stage.number, limit, cursor, equal=in_state))
    return first_of(pages, Stage.number, limit)


def _part_of(state: str) -> str:
    """The condition of the partial index that has the stages in this state."""
    return HAS_ENDED if state in FINAL_STAGE_STATES else IS_UNFINISHED
