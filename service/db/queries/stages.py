"""Queries over stages: planning, claims, leases, the fence, and how they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, cast

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Row,
    Select,
    String,
    Table,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate

from service.db.clock import now_seconds
from service.db.queries.pages import ColumnValues, Page, fetch_page
from service.db.queries.rows import UNSYNCED, insert_rows, is_any_of, without_texts
from service.db.tables import IS_UNFINISHED, Job, Model, Stage, StageDependency
from service.errors import LeaseLostError
from service.ids import IdKind, new_id
from service.plan import PlannedStage
from service.queue import Hint
from service.states import FINAL_STAGE_STATES, QueueName, StageKind, StageState, queue_of

_NO_LEASE: Mapping[str, Any] = {"lease_owner": None, "lease_expires_at": None}
_NO_HINT: Mapping[str, Any] = {"free_at": None, "hinted_at": None}
_JOBS_WINDOW = 1000
"""Free stages whose jobs are tried for a lock. Other claims lock at most one job per worker."""
_MAX_HINT_PAUSES = 16
"""The longest pause between two hints of a stage, in multiples of the first."""
_QUEUED_OR_HELD = case((Stage.pause_requested_at.is_(None), StageState.QUEUED), else_=StageState.HELD)
_COUNTED = (Stage.id, Stage.job_id, Stage.round, Stage.attempt, Stage.work)
_Counted = Row[str, str, int, int, float]
_STAGES = cast(Table, Stage.__table__)
_DEPENDENCIES = cast(Table, StageDependency.__table__)
_ZERO: ColumnElement[int] = literal_column("0")
# States as literals, since partial indexes are not used for bound parameters.
_QUEUED: ColumnElement[str] = literal_column(f"'{StageState.QUEUED}'")
_RUNNING: ColumnElement[str] = literal_column(f"'{StageState.RUNNING}'")
_GROUP_QUEUE = bindparam("group_queue", type_=String)
_GROUP_KEY = bindparam("group_key", type_=String)
_GROUP_BASE = bindparam("group_base", type_=String)
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


@dataclass(frozen=True)
class FreeGroup:
    """Free stages of one queue, one API key and one base model.

    Attributes:
        queue: The queue.
        fair_key: The API key of their jobs; "" if none.
        base: The base model that they load; "" if none.
        job_id: The job of the stage to claim first.
    """

    queue: str
    fair_key: str
    base: str
    job_id: str


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


def is_free(stage: type[Stage]) -> ColumnElement[bool]:
    """The stage is queued, its pause has ended and its dependencies have succeeded."""
    return and_(stage.state == _QUEUED, stage.unmet == _ZERO, stage.not_before <= now_seconds())


def free_hint(session: Session, queues: Sequence[str] | None = None) -> Hint | None:
    """The hint of a stage that a worker of these queues (None: all) can claim. None if there is none."""
    for queue in tuple(QueueName) if queues is None else queues:
        stage_id = session.scalar(select(Stage.id).where(is_free(Stage), Stage.queue == queue).limit(1))
        if stage_id is not None:
            return stage_id, queue
    return None


def any_free(session: Session, queues: Sequence[str] | None = None) -> bool:
    """Whether a worker of these queues (None: all) can claim a stage."""
    return free_hint(session, queues) is not None


def free_groups(
    session: Session, most: int, queues: Sequence[str] | None = None, prefer_base: str | None = None
) -> list[FreeGroup]:
    """The groups to claim the next stage from, best first. Nothing is locked.

    API keys come first by fair share: those with the fewest running stages of the queue, then those whose last stage of
    the queue started longest ago. The groups of a key are ordered by the priority and then the age of the job of their
    first stage.

    Args:
        session: A view of the database.
        most: The maximum number of groups.
        queues: The queues to search; None is all.
        prefer_base: The groups on this base model, and those that need none, come before all others.

    The time depends on the number of groups, not on the number of stages.
    """
    names = tuple(QueueName) if queues is None else tuple(queues)
    query = _free_groups(names, prefer_base is not None)
    rows = session.execute(query, {"most": most, "prefer_base": prefer_base})
    return [FreeGroup(row.queue, row.fair_key, row.base, row.job_id) for row in rows]


@cache
def _free_groups(queues: tuple[str, ...], prefers_base: bool) -> Select[Any]:
    # 1. the first stage of each group, and the use that its key makes of the workers
    heads = _heads(queues)
    running = aliased(Stage)
    same_queue_and_key = (running.queue == Stage.queue, running.fair_key == Stage.fair_key)
    running_of_key = select(func.count()).where(running.state == _RUNNING, *same_queue_and_key)
    served = aliased(Stage)
    last_of_key = select(func.max(served.started_at))
    last_of_key = last_of_key.where(served.queue == Stage.queue, served.fair_key == Stage.fair_key)
    head = (
        select(
            *(Stage.queue, Stage.fair_key, Stage.base, Stage.rank, Stage.job_id, Stage.number),
            running_of_key.correlate(Stage).scalar_subquery().label("running"),
            func.coalesce(last_of_key.correlate(Stage).scalar_subquery(), 0.0).label("served_at"),
        )
        .join_from(heads, Stage, Stage.id == heads.c.id)
        .subquery()
        .c
    )

    # 2. fair share among the keys, then the order within a key
    by_key: list[ColumnElement[Any]] = [head.running, head.served_at, head.fair_key]
    in_key: list[ColumnElement[Any]] = [head.rank, head.job_id, head.number]
    preferred: list[ColumnElement[Any]] = []
    if prefers_base:
        preferred.append(case((head.base.in_(("", bindparam("prefer_base", type_=String))), 0), else_=1))
    query = select(head.queue, head.fair_key, head.base, head.job_id).order_by(*preferred, *by_key, *in_key)
    return query.limit(bindparam("most"))


def _heads(queues: tuple[str, ...]) -> CTE:
    """The ids of the first claimable stage of each group: an index lookup for each (a loose index scan)."""

    def first_of(outer: FromClause, queue: ColumnElement[str], *conditions: ColumnElement[bool]) -> ColumnElement[str]:
        of_queue = select(Stage.id).where(is_free(Stage), Stage.queue == queue, *conditions)
        order = (Stage.fair_key, Stage.base, Stage.rank, Stage.job_id, Stage.number)
        return of_queue.order_by(*order).limit(1).correlate(outer).scalar_subquery()

    # 1. the first stage of each queue
    names = union_all(*(select(literal_column(f"'{QueueName(name)}'").label("queue")) for name in queues)).subquery()
    heads = select(first_of(names, names.c.queue).label("id")).select_from(names).cte("heads", recursive=True)

    # 2. the first stage of the group that follows: the next base model of the key, or else the next key
    head = cast(Table, Stage.__table__).alias()
    of_next_base = first_of(head, head.c.queue, Stage.fair_key == head.c.fair_key, Stage.base > head.c.base)
    of_next_key = first_of(head, head.c.queue, Stage.fair_key > head.c.fair_key)
    following = select(func.coalesce(of_next_base, of_next_key))
    return heads.union_all(following.join_from(heads, head, head.c.id == heads.c.id))


def _of_group(stage: type[Stage]) -> ColumnElement[bool]:
    """The stage is free and in the group of the parameters."""
    group = (stage.queue == _GROUP_QUEUE, stage.fair_key == _GROUP_KEY, stage.base == _GROUP_BASE)
    return and_(is_free(stage), *group)


def lock_free_job(session: Session, group: FreeGroup) -> Job | None:
    """Lock the first job of the group that no other transaction has locked. None if there is none."""
    job: Job | None = session.scalar(_unlocked_job(), _parameters(group))
    return job


def _parameters(group: FreeGroup) -> dict[str, Any]:
    return {"group_queue": group.queue, "group_key": group.fair_key, "group_base": group.base}


@cache
def _unlocked_job() -> Select[Any]:
    order = (Stage.rank, Stage.job_id, Stage.number)
    first = select(*order).where(_of_group(Stage)).order_by(*order).limit(_JOBS_WINDOW).subquery()
    query = select(Job).options(*without_texts()).join_from(first, Job, Job.id == first.c.job_id).limit(1)
    query = query.order_by(first.c.rank, first.c.job_id, first.c.number)
    unlocked = query.with_for_update(of=Job, key_share=True, skip_locked=True)
    return unlocked.execution_options(populate_existing=True)


def claim(session: Session, group: FreeGroup, job: Job, owner: str, lease_seconds: float) -> Stage | None:
    """Claim the first stage of a job under a lease with a new epoch.

    Args:
        session: The transaction, which has locked the job.
        group: The group of the stage.
        job: The job.
        owner: The name of the worker.
        lease_seconds: The duration of the lease.

    Returns:
        The stage. None if the job has no free stage in this group, or other transactions have locked them.
    """
    of_job = {"group_job": job.id, "group_rank": -job.priority}
    parameters = {**_parameters(group), **of_job, "owner": owner, "seconds": lease_seconds}
    stage: Stage | None = session.scalar(_claim_first(), parameters, execution_options=UNSYNCED)
    return stage


@cache
def _claim_first() -> ReturningUpdate[Any]:
    # 1. lock the first row that no other transaction has locked
    candidate = aliased(Stage)
    of_job = and_(
        candidate.job_id == bindparam("group_job", type_=String),
        candidate.rank == bindparam("group_rank", type_=BigInteger),
    )
    free = select(candidate.id).where(of_job, _of_group(candidate)).order_by(candidate.number).limit(1)
    unlocked = free.with_for_update(skip_locked=True)

    # 2. start the attempt; the row is free, since its lock was acquired and its state checked together
    return (
        update(Stage)
        .where(Stage.id == unlocked.scalar_subquery())
        .values(
            state=StageState.RUNNING,
            lease_owner=bindparam("owner", type_=String),
            lease_epoch=Stage.lease_epoch + 1,
            lease_expires_at=now_seconds() + bindparam("seconds", type_=Double),
            attempt=Stage.attempt + 1,
            progress_done=0,
            progress_total=0,
            started_at=now_seconds(),
            error_code=None,
            error_message=None,
        )
        .returning(Stage)
    )


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
    row = session.execute(query).first()
    if row is None:
        raise LeaseLostError(f"the lease on {stage_id} is lost")

    if row.cancel_requested_at is not None:
        return StopRequest.CANCEL
    return StopRequest.NONE if row.pause_requested_at is None else StopRequest.PAUSE


def require_lease(session: Session, stage_id: str, epoch: int) -> None:
    """Lock the stage until the transaction ends. Raises LeaseLostError."""
    _fenced(session, stage_id, epoch, {})


def save_checkpoint(session: Session, stage_id: str, epoch: int, key: str, sha256: str) -> None:
    """Store the checkpoint of the stage and reset its counts of crashes and failures. Raises LeaseLostError."""
    values = {"checkpoint_key": key, "checkpoint_sha256": sha256, "checkpoint_at": now_seconds()}
    _fenced(session, stage_id, epoch, {**values, "crash_count": 0, "failure_count": 0})


def succeed(session: Session, stage_id: str, epoch: int, steps: int, memory_bytes: int | None) -> bool:
    """End the stage with success. False, without a change, if a cancel was requested. Raises LeaseLostError."""
    values: dict[str, Any] = {
        "state": StageState.SUCCEEDED,
        "finished_at": now_seconds(),
        "memory_bytes": memory_bytes,
        "progress_done": steps,
        "progress_total": steps,
        **_NO_LEASE,
    }
    query = update(Stage).where(*_held(stage_id, epoch), Stage.cancel_requested_at.is_(None))
    ended = session.execute(query.values(values).returning(*_COUNTED)).first()
    if ended is not None:
        _count_in_job(session, ended, ended.work)
        _meet_dependencies(session, stage_id)
        return True

    _fenced(session, stage_id, epoch, {})
    return False


def _count_in_job(session: Session, ended: _Counted, work: float = 0) -> None:
    """Update the running sums of the job after an attempt of its stage has ended, with the work if it succeeded."""
    job = update(Job).where(Job.id == ended.job_id)
    is_later = or_(Job.last_round.is_(None), Job.last_round < ended.round)
    sums = {
        "work_done": Job.work_done + work,
        "attempts": case((Job.attempts < ended.attempt, ended.attempt), else_=Job.attempts),
        "last_round": case((is_later, ended.round), else_=Job.last_round),
    }
    session.execute(job.values(sums), execution_options=UNSYNCED)


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
    values = {"state": state, "finished_at": now_seconds(), "error_code": code, "error_message": message}
    _count_in_job(session, _fenced(session, stage_id, epoch, {**values, **_NO_LEASE}))


def requeue(
    session: Session, stage_id: str, epoch: int, pause_seconds: float, code: str | None, message: str | None
) -> None:
    """Requeue the stage after a failed attempt. It cannot be claimed before the pause ends. Raises LeaseLostError."""
    values = {"state": _QUEUED_OR_HELD, "not_before": now_seconds() + pause_seconds, **_NO_HINT}
    values |= {"error_code": code, "error_message": message, **_NO_LEASE}
    _count_in_job(session, _fenced(session, stage_id, epoch, values))


def give_back(session: Session, stage_id: str, epoch: int) -> None:
    """Requeue the stage at once, without counting the attempt, since nothing failed. Raises LeaseLostError."""
    values = {"state": _QUEUED_OR_HELD, "not_before": now_seconds(), "attempt": Stage.attempt - 1, **_NO_HINT}
    _count_in_job(session, _fenced(session, stage_id, epoch, {**values, **_NO_LEASE}))


def mark_free(session: Session, job_id: str) -> list[Hint]:
    """Hints for the free stages of the job that were never hinted. They are marked as hinted."""
    session.flush()
    return _mark(session, Stage.job_id == job_id, Stage.hinted_at.is_(None), is_free(Stage))


def _is_hint_due(stage: type[Stage], pause_seconds: float, pause_doubles: bool) -> ColumnElement[bool]:
    """The stage is free and was never hinted, or its pause has ended. A pause that doubles is as long as all before."""
    since_hint = now_seconds() - stage.hinted_at
    has_paused = since_hint >= pause_seconds
    if pause_doubles:
        has_paused &= or_(since_hint >= stage.hinted_at - stage.free_at, since_hint >= _MAX_HINT_PAUSES * pause_seconds)
    return is_free(stage) & or_(stage.hinted_at.is_(None), has_paused)


def count_free(session: Session, queue: str, most: int) -> int:
    """The number of stages of the queue that can be claimed, counted up to `most`."""
    free = select(Stage.id).where(is_free(Stage), Stage.queue == queue).limit(most).subquery()
    return session.scalars(select(func.count()).select_from(free)).one()


def mark_hinted(session: Session, pause_seconds: float, queue: str, most: int, *, pause_doubles: bool) -> list[Hint]:
    """Hints for at most `most` free stages of a queue whose hint is due. They are marked as hinted.

    Rows that another transaction has locked are skipped, so that different lock orders cannot deadlock.

    Args:
        session: The transaction.
        pause_seconds: The pause after the first hint of a stage.
        queue: The queue.
        most: The maximum number of stages.
        pause_doubles: Whether each pause is as long as all before it.
    """
    candidate = aliased(Stage)
    due = (_is_hint_due(candidate, pause_seconds, pause_doubles), candidate.queue == queue)
    chosen = select(candidate.id).where(*due).limit(most)
    return _mark(session, Stage.id.in_(chosen.with_for_update(skip_locked=True)))


def _mark(session: Session, *condition: ColumnElement[bool]) -> list[Hint]:
    values = {"hinted_at": now_seconds(), "free_at": func.coalesce(Stage.free_at, now_seconds())}
    query = update(Stage).where(*condition).values(values).returning(Stage.id, Stage.queue)
    return [(stage_id, queue) for stage_id, queue in session.execute(query, execution_options=UNSYNCED)]


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


def expired(session: Session) -> list[Stage]:
    """Running stages whose lease has expired."""
    query = select(Stage).where(Stage.state == StageState.RUNNING, Stage.lease_expires_at < now_seconds())
    return list(session.scalars(query.order_by(Stage.id)))


def running_under(session: Session, owner_prefix: str) -> list[Stage]:
    """Running stages of the workers whose names start with `owner_prefix`."""
    query = select(Stage).where(Stage.state == StageState.RUNNING)
    return list(session.scalars(query.where(Stage.lease_owner.startswith(owner_prefix, autoescape=True))))


def cancel_unfinished(session: Session, job_id: str) -> None:
    """Cancel the stages of the job that have not started, and request its running stages to cancel."""
    of_job = update(Stage).where(Stage.job_id == job_id).execution_options(**UNSYNCED)
    cancelled = {"state": StageState.CANCELLED, "finished_at": now_seconds()}
    not_started = (StageState.QUEUED, StageState.HELD, StageState.WAITING)
    session.execute(of_job.where(Stage.state.in_(not_started)).values(cancelled))
    running = of_job.where(Stage.state == StageState.RUNNING, Stage.cancel_requested_at.is_(None))
    session.execute(running.values(cancel_requested_at=now_seconds()))


def hold(session: Session, job_id: str) -> None:
    """Hold the queued stages of the job, and request its running stages to pause."""
    of_job = update(Stage).where(Stage.job_id == job_id).execution_options(**UNSYNCED)
    requested = {"pause_requested_at": now_seconds()}
    session.execute(of_job.where(Stage.state == StageState.QUEUED).values(state=StageState.HELD, **requested))
    session.execute(of_job.where(Stage.state.in_((StageState.RUNNING, StageState.WAITING))).values(requested))


def release(session: Session, job_id: str) -> None:
    """Queue the held stages of the job. The inverse of `hold`."""
    of_job = update(Stage).where(Stage.job_id == job_id).execution_options(**UNSYNCED)
    session.execute(of_job.where(Stage.state == StageState.HELD).values(state=StageState.QUEUED, **_NO_HINT))
    session.execute(of_job.where(Stage.pause_requested_at.is_not(None)).values(pause_requested_at=None))


def reopen(session: Session, job_id: str) -> bool:
    """Queue the failed and cancelled stages of the job, without their counts of failures. False if there are none."""
    values = {
        "state": case((Stage.kind == StageKind.REVIEW, StageState.WAITING), else_=StageState.QUEUED),
        "not_before": now_seconds(),
        "finished_at": None,
        "cancel_requested_at": None,
        "pause_requested_at": None,
        "crash_count": 0,
        "failure_count": 0,
        "error_code": None,
        "error_message": None,
        **_NO_HINT,
    }
    ended = (StageState.FAILED, StageState.CANCELLED)
    query = update(Stage).where(Stage.job_id == job_id, Stage.state.in_(ended)).values(values)
    return session.execute(query.returning(Stage.id), execution_options=UNSYNCED).first() is not None


def waits_for_people(session: Session, job_id: str) -> bool:
    """Whether a review is due and no other stage of the job can run."""
    of_job = select(Stage.id).where(Stage.job_id == job_id, Stage.unmet == 0)
    due = of_job.where(Stage.state == StageState.WAITING)
    other = of_job.where(Stage.state == StageState.QUEUED)
    return session.scalar(due.limit(1)) is not None and session.scalar(other.limit(1)) is None


def succeed_reviews(session: Session, job_id: str) -> bool:
    """End the due reviews of the job with success. False if none was due."""
    query = update(Stage).where(Stage.job_id == job_id, Stage.state == StageState.WAITING, Stage.unmet == 0)
    values = {"state": StageState.SUCCEEDED, "finished_at": now_seconds()}
    reviews = session.execute(query.values(values).returning(*_COUNTED), execution_options=UNSYNCED).all()
    for review in reviews:
        _count_in_job(session, review, review.work)
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

    `with_error` selects the stages whose last attempt has failed and that no later attempt has replaced yet.
    """
    query = select(Stage).where(Stage.job_id == job_id)
    if with_error:
        query = query.where(Stage.error_code.is_not(None))
    equal: ColumnValues = {Stage.state: list(state), Stage.kind: list(kind), Stage.round: round_number}
    return fetch_page(session, query, Stage.number, limit, cursor, equal=equal)
