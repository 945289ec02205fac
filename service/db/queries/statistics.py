"""Counts over an installation, for its metrics: one pass over a table or an index for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, case, func, select
from sqlalchemy.orm import Session, aliased

from service.db.clock import now_seconds
from service.db.queries import stages
from service.db.tables import Event, Job, Sample, Stage, StageDependency
from service.states import JobState, SampleRole, StageKind, StageState

STAGE_BUCKETS = (0.5, 2.0, 10.0, 60.0, 300.0, 1800.0, 7200.0)
_UNFINISHED = (StageState.QUEUED, StageState.RUNNING)


@dataclass(frozen=True)
class Leases:
    """`workers` hold a running stage; `expired` running stages have a silent one."""

    workers: int
    expired: int


@dataclass(frozen=True)
class StageTimes:
    """Seconds of the last attempts of successful stages: their sum, and how many took at most each of STAGE_BUCKETS."""

    count: int
    total: float
    at_most: tuple[int, ...]


def _counts(session: Session, query: Select[Any, int], names: Iterable[str]) -> dict[str, int]:
    """A query of names and counts; 0 for each of `names` that it does not find."""
    return {str(name): 0 for name in names} | {str(name): count for name, count in session.execute(query)}


def jobs_by_state(session: Session) -> dict[str, int]:
    """All states, also those that no job is in."""
    return _counts(session, select(Job.state, func.count()).group_by(Job.state), JobState)


def unfinished_stages(session: Session) -> dict[tuple[str, str], int]:
    """Queued and running stages by state and kind."""
    query = select(Stage.state, Stage.kind, func.count()).where(Stage.state.in_(_UNFINISHED))
    found = {(str(state), str(kind)): 0 for state in _UNFINISHED for kind in StageKind}
    return found | {(state, kind): n for state, kind, n in session.execute(query.group_by(Stage.state, Stage.kind))}


def ready_stages(session: Session) -> dict[str, int]:
    """Stages that could be claimed now, by kind."""
    query = select(Stage.kind, func.count()).where(stages.is_free(Stage)).group_by(Stage.kind)
    return _counts(session, query, StageKind)


def oldest_ready_seconds(session: Session) -> float:
    """How long a stage could have been claimed already, the longest of them; 0 if there is none."""
    needed = aliased(Stage)
    unblocked = (
        select(func.max(needed.finished_at))
        .join(StageDependency, StageDependency.needs_id == needed.id)
        .where(StageDependency.stage_id == Stage.id)
        .scalar_subquery()
    )
    ready_since = case((unblocked > Stage.not_before, unblocked), else_=Stage.not_before)
    since = session.scalar(select(func.min(ready_since)).where(stages.is_free(Stage)))
    return 0.0 if since is None else max(0.0, session.scalars(select(now_seconds())).one() - since)


def leases(session: Session) -> Leases:
    """Who works, and who went silent."""
    expired = case((Stage.lease_expires_at < now_seconds(), 1), else_=0)
    query = select(func.count(Stage.lease_owner.distinct()), func.coalesce(func.sum(expired), 0))
    workers, silent = session.execute(query.where(Stage.state == StageState.RUNNING)).one()
    return Leases(workers, silent)


def failed_attempts(session: Session) -> dict[str, int]:
    """Attempts at stages that failed, by the error's code."""
    code = Event.data["code"].as_string()
    query = select(code, func.count()).where(Event.kind.in_(("stage.retried", "stage.failed"))).group_by(code)
    return _counts(session, query, ("worker_lost",))


def images_by_role(session: Session) -> dict[str, int]:
    """Images that were made."""
    return _counts(session, select(Sample.role, func.count()).group_by(Sample.role), SampleRole)


def stage_seconds(session: Session) -> dict[str, StageTimes]:
    """How long workers took for stages, by kind; only kinds that there were. What people do has no start."""
    seconds = Stage.finished_at - Stage.started_at
    within = [func.sum(case((seconds <= limit, 1), else_=0)) for limit in STAGE_BUCKETS]
    query = select(Stage.kind, func.count(), func.sum(seconds), *within)
    query = query.where(Stage.state == StageState.SUCCEEDED, Stage.started_at.is_not(None)).group_by(Stage.kind)
    return {row[0]: StageTimes(row[1], float(row[2]), tuple(map(int, row[3:]))) for row in session.execute(query)}
