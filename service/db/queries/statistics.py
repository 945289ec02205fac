"""Statistics of an installation for /metrics. Each query scans one table or index once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from sqlalchemy import Select, case, func, select, text
from sqlalchemy.orm import Session, aliased

from service.db.clock import now_seconds
from service.db.queries import free_stages, jobs
from service.db.queries.rows import is_kept
from service.db.tables import IS_RUNNING, IS_UNFINISHED, Event, Job, PreferenceTest, Sample, Stage, StageDependency
from service.states import JobState, SampleRole, StageKind, StageState

STAGE_BUCKETS = (0.5, 2.0, 10.0, 60.0, 300.0, 1800.0, 7200.0)
_UNFINISHED = (StageState.QUEUED, StageState.RUNNING)


@dataclass(frozen=True)
class Leases:
    """The number of workers with a running stage, and of running stages with an expired lease."""

    workers: int
    expired: int


@dataclass(frozen=True)
class StageTimes:
    """A histogram of the seconds of successful stages' last attempts.

    Attributes:
        count: The number of stages.
        total: The sum of their seconds.
        at_most: The numbers of stages that took at most each limit of STAGE_BUCKETS.
    """

    count: int
    total: float
    at_most: tuple[int, ...]


def _counts(session: Session, query: Select[Any, int], names: Iterable[str]) -> dict[str, int]:
    """The counts of a query, by name; 0 for each of `names` that it does not return."""
    counts = dict.fromkeys(map(str, names), 0)
    for name, count in session.execute(query):
        counts[str(name)] = count
    return counts


def jobs_by_state(session: Session) -> dict[str, int]:
    """The number of jobs in each state."""
    return _counts(session, select(Job.state, func.count()).where(is_kept(Job)).group_by(Job.state), JobState)


def unfinished_stages(session: Session) -> dict[tuple[str, str], int]:
    """The number of queued and running stages, by state and kind."""
    query = select(Stage.state, Stage.kind, func.count()).where(text(IS_UNFINISHED), Stage.state.in_(_UNFINISHED))
    counts = {(str(state), str(kind)): 0 for state, kind in product(_UNFINISHED, StageKind)}
    for state, kind, count in session.execute(query.group_by(Stage.state, Stage.kind)):
        counts[state, kind] = count
    return counts


def ready_stages(session: Session) -> dict[str, int]:
    """The number of stages that can be claimed, by kind."""
    query = select(Stage.kind, func.count()).where(free_stages.is_free(Stage)).group_by(Stage.kind)
    return _counts(session, query, StageKind)


def oldest_ready_seconds(session: Session) -> float:
    """The longest time that a stage has been waiting to be claimed; 0 if none is waiting."""
    # 1. when the last dependency succeeded
    needed = aliased(Stage)
    unblocked = (
        select(func.max(needed.finished_at))
        .join(StageDependency, StageDependency.needs_id == needed.id)
        .where(StageDependency.stage_id == Stage.id)
        .scalar_subquery()
    )

    # 2. when the stage became ready
    ready_at = case((unblocked > Stage.not_before, unblocked), else_=Stage.not_before)
    oldest = session.scalar(select(func.min(ready_at)).where(free_stages.is_free(Stage)))
    return 0.0 if oldest is None else max(0.0, jobs.now(session) - oldest)


def leases(session: Session) -> Leases:
    """The leases of all running stages."""
    is_expired = case((Stage.lease_expires_at < now_seconds(), 1), else_=0)
    query = select(func.count(Stage.lease_owner.distinct()), func.coalesce(func.sum(is_expired), 0))
    workers, expired = session.execute(query.where(text(IS_RUNNING))).one()
    return Leases(workers, expired)


def failed_attempts(session: Session) -> dict[str, int]:
    """The number of failed attempts of stages, by error code."""
    code = Event.data["code"].as_string()
    query = select(code, func.count()).where(Event.kind.in_(("stage.retried", "stage.failed"))).group_by(code)
    return _counts(session, query, ("worker_lost",))


def images_by_role(session: Session) -> dict[str, int]:
    """The number of images, by the role of their sample."""
    return _counts(session, select(Sample.role, func.count()).group_by(Sample.role), SampleRole)


def preference_answers(session: Session) -> int:
    """The number of answers of all preference tests."""
    return session.scalar(select(func.coalesce(func.sum(PreferenceTest.answers), 0))) or 0


def stage_seconds(session: Session) -> dict[str, StageTimes]:
    """The durations of successful stages, by kind. Kinds without such stages are left out, and so are reviews."""
    seconds = Stage.finished_at - Stage.started_at
    within = [func.sum(case((seconds <= limit, 1), else_=0)) for limit in STAGE_BUCKETS]
    query = select(Stage.kind, func.count(), func.sum(seconds), *within)
    query = query.where(Stage.state == StageState.SUCCEEDED, Stage.started_at.is_not(None)).group_by(Stage.kind)
    return {row[0]: StageTimes(row[1], float(row[2]), tuple(map(int, row[3:]))) for row in session.execute(query)}
