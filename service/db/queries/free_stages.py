"""Queries of free stages: the search for the next one, claims, and hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Select,
    String,
    Table,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate

from service.db.clock import now_seconds
from service.db.queries.rows import UNSYNCED, without_texts
from service.db.tables import Job, Stage
from service.queue import Hint
from service.states import QueueName, StageState

_MAX_HINT_PAUSES = 16
"""The longest pause between two hints of a stage, in multiples of the first."""
_ZERO: ColumnElement[int] = literal_column("0")
# States as literals, since partial indexes are not used for bound parameters.
_QUEUED: ColumnElement[str] = literal_column(f"'{StageState.QUEUED}'")
_RUNNING: ColumnElement[str] = literal_column(f"'{StageState.RUNNING}'")
_GROUP_QUEUE = bindparam("group_queue", type_=String)
_GROUP_KEY = bindparam("group_key", type_=String)
_GROUP_BASE = bindparam("group_base", type_=String)


@dataclass(frozen=True)
class FreeGroup:
    """Free stages of one queue, one API key and one base model.

    Attributes:
        queue: The queue.
        fair_key: The API key of their jobs; "" if none.
        base: The base model that they load; "" if none.
        rank: The rank of the job of the stage to claim first.
        job_id: That job.
        running: The running stages of the key in this queue.
        is_preferred: Whether the group comes before all those that are not, regardless of the shares of their keys.
    """

    queue: str
    fair_key: str
    base: str
    rank: int
    job_id: str
    running: int = 0
    is_preferred: bool = True


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
    session: Session, limit: int, queues: Sequence[str] | None = None, prefer_base: str | None = None
) -> list[FreeGroup]:
    """The groups to claim the next stage from, best first. Nothing is locked.

    API keys come first by fair share: those with the fewest running stages of the queue, then those whose last stage of
    the queue started longest ago. The groups of a key are ordered by the priority and then the age of the job of their
    first stage.

    Args:
        session: A view of the database.
        limit: The maximum number of groups.
        queues: The queues to search; None is all.
        prefer_base: The groups on this base model, and those that need none, come before all others.

    The time depends on the number of groups, not on the number of stages.
    """
    names = tuple(QueueName) if queues is None else tuple(queues)
    query = _free_groups(names, prefer_base is not None)
    rows = session.execute(query, {"limit": limit, "prefer_base": prefer_base})
    return [FreeGroup(*row) for row in rows]


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
    is_preferred: ColumnElement[bool] = true()
    if prefers_base:
        is_preferred = head.base.in_(("", bindparam("prefer_base", type_=String)))
    columns = (head.queue, head.fair_key, head.base, head.rank, head.job_id, head.running, is_preferred)
    query = select(*columns).order_by(case((is_preferred, 0), else_=1), *by_key, *in_key)
    return query.limit(bindparam("limit"))


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


def lock_if_unlocked(session: Session, job_id: str) -> Job | None:
    """Lock the row of the job as `jobs.lock` does, without waiting. None if another transaction has locked it."""
    job: Job | None = session.scalar(_unlocked_job(), {"job_id": job_id})
    return job


@cache
def _unlocked_job() -> Select[Any]:
    query = select(Job).options(*without_texts()).where(Job.id == bindparam("job_id", type_=String))
    unlocked = query.with_for_update(key_share=True, skip_locked=True)
    return unlocked.execution_options(populate_existing=True)


def following_job(session: Session, group: FreeGroup) -> FreeGroup | None:
    """The group without its first job. None if no other job has a stage in it. The size of the first does not count."""
    of_first = {"first_rank": group.rank, "first_job": group.job_id}
    row = session.execute(_following_job(), {**_parameters(group), **of_first}).first()
    return None if row is None else replace(group, rank=row.rank, job_id=row.job_id)


@cache
def _following_job() -> Select[int, str]:
    first = (bindparam("first_rank", type_=BigInteger), bindparam("first_job", type_=String))
    query = select(Stage.rank, Stage.job_id).where(_of_group(Stage), tuple_(Stage.rank, Stage.job_id) > tuple_(*first))
    return query.order_by(Stage.rank, Stage.job_id, Stage.number).limit(1)


def _parameters(group: FreeGroup) -> dict[str, Any]:
    return {"group_queue": group.queue, "group_key": group.fair_key, "group_base": group.base}


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


def count_free(session: Session, queue: str, limit: int) -> int:
    """The number of stages of the queue that can be claimed, counted up to `limit`."""
    free = select(Stage.id).where(is_free(Stage), Stage.queue == queue).limit(limit).subquery()
    return session.scalars(select(func.count()).select_from(free)).one()


def mark_free(session: Session, job_id: str) -> list[Hint]:
    """Hints for the free stages of the job that were never hinted. They are marked as hinted."""
    session.flush()
    return _mark(session, Stage.job_id == job_id, Stage.hinted_at.is_(None), is_free(Stage))


def mark_hinted(session: Session, pause_seconds: float, queue: str, limit: int, *, pause_doubles: bool) -> list[Hint]:
    """Hints for at most `limit` free stages of a queue whose hint is due. They are marked as hinted.

    Rows that another transaction has locked are skipped, so that different lock orders cannot deadlock.

    Args:
        session: The transaction.
        pause_seconds: The pause after the first hint of a stage.
        queue: The queue.
        limit: The maximum number of stages.
        pause_doubles: Whether each pause is as long as all before it.
    """
    candidate = aliased(Stage)
    due = (_is_hint_due(candidate, pause_seconds, pause_doubles), candidate.queue == queue)
    chosen = select(candidate.id).where(*due).limit(limit)
    return _mark(session, Stage.id.in_(chosen.with_for_update(skip_locked=True)))


def _is_hint_due(stage: type[Stage], pause_seconds: float, pause_doubles: bool) -> ColumnElement[bool]:
    """The stage is free and was never hinted, or its pause has ended. A pause that doubles is as long as all before."""
    since_hint = now_seconds() - stage.hinted_at
    has_paused = since_hint >= pause_seconds
    if pause_doubles:
        has_paused &= or_(since_hint >= stage.hinted_at - stage.free_at, since_hint >= _MAX_HINT_PAUSES * pause_seconds)
    return is_free(stage) & or_(stage.hinted_at.is_(None), has_paused)


def _mark(session: Session, *condition: ColumnElement[bool]) -> list[Hint]:
    values = {"hinted_at": now_seconds(), "free_at": func.coalesce(Stage.free_at, now_seconds())}
    query = update(Stage).where(*condition).values(values).returning(Stage.id, Stage.queue)
    return [(stage_id, queue) for stage_id, queue in session.execute(query, execution_options=UNSYNCED)]
