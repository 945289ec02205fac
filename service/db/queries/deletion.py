"""Queries that delete jobs: what uses a job, the jobs to delete because of their age, and the removal of their rows.

Each query of a collection reads and writes a bounded number of rows, regardless of the size of the tables.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Column, ColumnElement, delete, exists, or_, select, text, tuple_, update
from sqlalchemy import Table as SqlTable
from sqlalchemy.orm import Session, aliased

from service.db.clock import now_seconds
from service.db.queries import jobs, prompt_sets
from service.db.queries.collection import Position
from service.db.queries.rows import UNSYNCED, is_any_of, is_kept
from service.db.tables import (
    HAS_ENDED_AND_IS_KEPT,
    HAS_OLD_EVENTS,
    IS_DELETED,
    Event,
    IdempotencyKey,
    Job,
    JobPromptSet,
    JobSource,
    Model,
    ModelAlias,
    PreferenceTest,
    Stage,
    StageDependency,
    Table,
)
from service.errors import NotFoundError
from service.ids import IdKind, expect
from service.states import CACHE_KINDS, FINAL_JOB_STATES, JobState

_T = Table.metadata.tables
CONTENTS: tuple[SqlTable, ...] = (
    _T["exports"],
    _T["previews"],
    _T["pairs"],
    _T["samples"],
    _T["metrics"],
    _T["models"],
    _T["artifacts"],
    _T["events"],
    _T["idempotency_keys"],
    _T["job_prompt_sets"],
    _T["job_sources"],
)
"""The tables whose rows belong to jobs, in the order of their removal: a row is referenced only by rows of earlier
tables or of the same table. Verdicts are deleted with their pairs, scores with their samples, and prompts of the job
itself with its references to prompt sets. `forget_skeleton` deletes stages and jobs last.
"""


# requests


def lock(session: Session, job_id: str) -> Job:
    """Lock the job, so that no other transaction can insert a row that references it. Raises NotFoundError."""
    query = select(Job).where(Job.id == expect(IdKind.JOB, job_id), is_kept(Job)).with_for_update()
    job = session.scalar(query.execution_options(populate_existing=True))
    if job is None:
        raise NotFoundError(f"there is no job {job_id}")
    return job


def users(session: Session, job_id: str, limit: int) -> list[str]:
    """The first jobs that use this job, then the first aliases of its models and preference tests of its images."""
    using = (
        select(Job.id)
        .join(JobSource, JobSource.job_id == Job.id)
        .where(JobSource.source_id == job_id, Job.kind.not_in(CACHE_KINDS), is_kept(Job))
    )
    names = select(ModelAlias.name).join(Model, Model.id == ModelAlias.model_id).where(Model.job_id == job_id)
    tests = select(PreferenceTest.id).where(PreferenceTest.job_id == job_id)
    return [
        *session.scalars(using.order_by(Job.id).limit(limit)),
        *(f"the alias {name}" for name in session.scalars(names.order_by(ModelAlias.name).limit(limit))),
        *(f"the preference test {test}" for test in session.scalars(tests.order_by(PreferenceTest.id).limit(limit))),
    ][:limit]


def used(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that other jobs, aliases or preference tests use."""
    user = aliased(Job)
    prevents = (user.kind.not_in(CACHE_KINDS), user.deleted_at.is_(None))
    by_job = exists().where(JobSource.source_id == Job.id, JobSource.job_id == user.id, *prevents)
    by_alias = exists().where(Model.job_id == Job.id, ModelAlias.model_id == Model.id)
    by_test = exists().where(PreferenceTest.job_id == Job.id)
    return set(session.scalars(select(Job.id).where(is_any_of(Job.id, job_ids), or_(by_job, by_alias, by_test))))


def mark(session: Session, job_id: str) -> None:
    """Mark the job as deleted. Its retries lose their reference to it; a request with its key creates a new job."""
    _execute(session, update(Job).where(Job.origin_id == job_id).values(origin_id=None))
    _execute(session, delete(IdempotencyKey).where(IdempotencyKey.job_id == job_id))
    values = {"deleted_at": now_seconds(), "purge_at": now_seconds()}
    _execute(session, update(Job).where(Job.id == job_id).values(values))


def is_deleted(session: Session, job_id: str) -> bool:
    """Whether the job is marked as deleted, or no longer exists."""
    return not jobs.exists(session, job_id)


# retention


def expired(session: Session, state: JobState, ended_by: float, after: Position, limit: int) -> list[Position]:
    """The next jobs that ended in this state by this time, in the order in which they ended."""
    query = select(Job.finished_at, Job.id).where(
        text(HAS_ENDED_AND_IS_KEPT),
        Job.state == state,
        tuple_(Job.finished_at, Job.id) > tuple_(*after),
        Job.finished_at <= ended_by,
    )
    rows = session.execute(query.order_by(Job.finished_at, Job.id).limit(limit))
    return [(row.finished_at, row.id) for row in rows if row.finished_at is not None]


def next_with_events(session: Session, ended_by: float) -> str | None:
    """The job that ended first, by this time, and still has its events."""
    query = select(Job.id).where(text(HAS_OLD_EVENTS), Job.finished_at <= ended_by)
    return session.scalar(query.order_by(Job.finished_at, Job.id).limit(1))


def forget_old_events(session: Session, before: float, limit: int) -> int | None:
    """Delete up to `limit` events of a job that ended before this time. Marks the job if none are left.

    Returns:
        Their number; None if no such job has events.
    """
    job_id = next_with_events(session, before)
    if job_id is None:
        return None

    job = jobs.lock(session, job_id)
    if job.state not in FINAL_JOB_STATES or job.finished_at is None or job.finished_at > before:
        return 0  # it was continued after the search

    removed = _delete(session, _T["events"], Event.job_id == job_id, limit)
    if removed < limit:
        _execute(session, update(Job).where(Job.id == job_id).values(events_removed_at=now_seconds()))
    return removed


def forget_old_keys(session: Session, before: float, limit: int) -> int | None:
    """Delete up to `limit` idempotency keys that were created before this time.

    Returns:
        Their number; None if there are none.
    """
    first = select(IdempotencyKey.key).where(IdempotencyKey.created_at <= before)
    keys = list(session.scalars(first.order_by(IdempotencyKey.created_at).limit(limit)))
    _execute(session, delete(IdempotencyKey).where(is_any_of(IdempotencyKey.key, keys)))
    return len(keys) or None


# removal of deleted jobs


def next_deleted(session: Session, after: Position) -> Position | None:
    """The next deleted job, whether or not its removal is due."""
    query = select(Job.purge_at, Job.id).where(text(IS_DELETED), tuple_(Job.purge_at, Job.id) > tuple_(*after))
    row = session.execute(query.order_by(Job.purge_at, Job.id).limit(1)).first()
    return None if row is None else (row.purge_at, row.id)


def caches_of(session: Session, source_id: str, limit: int) -> list[str]:
    """The first jobs of cache kinds that use a job, and that are neither deleted nor being cancelled."""
    query = (
        select(Job.id)
        .join(JobSource, JobSource.job_id == Job.id)
        .where(JobSource.source_id == source_id, Job.kind.in_(CACHE_KINDS), is_kept(Job))
        .where(or_(Job.cancel_requested_at.is_(None), Job.finished_at.is_not(None)))
    )
    return list(session.scalars(query.limit(limit)))


def next_to_purge(session: Session, after: Position) -> Position | None:
    """The next deleted job whose removal is due. One that is used waits until its users, also deleted, are removed."""
    query = select(Job.purge_at, Job.id).where(
        text(IS_DELETED),
        Job.purge_at <= now_seconds(),
        tuple_(Job.purge_at, Job.id) > tuple_(*after),
        ~exists().where(JobSource.source_id == Job.id),
    )
    row = session.execute(query.order_by(Job.purge_at, Job.id).limit(1)).first()
    return None if row is None else (row.purge_at, row.id)


def forget_contents(session: Session, job_id: str, limit: int) -> int:
    """Delete up to `limit` rows of a deleted job, without its stages. Returns their number; 0 if none are left."""
    # 1. the keys of checkpoints, before their objects
    cleared = {"checkpoint_key": None, "checkpoint_sha256": None}
    with_checkpoint = select(Stage.id).where(Stage.job_id == job_id, Stage.checkpoint_key.is_not(None)).limit(limit)
    checkpoints = list(session.scalars(with_checkpoint))
    if checkpoints:
        _execute(session, update(Stage).where(is_any_of(Stage.id, checkpoints)).values(cleared))
        return len(checkpoints)

    # 2. the rows; those in `job_sources` come last, since the rows before them can reference rows of the sources
    references = {"model_id": None, "prompt_set_id": None, "held_out_prompt_set_id": None}
    has_any = or_(Job.model_id.is_not(None), Job.prompt_set_id.is_not(None), Job.held_out_prompt_set_id.is_not(None))
    _execute(session, update(Job).where(Job.id == job_id, has_any).values(references))
    for table in CONTENTS:
        if table is _T["pairs"]:
            removed = _delete_with(session, table, _T["pair_verdicts"].c.pair_id, job_id, limit)
        elif table is _T["samples"]:
            removed = _delete_with(session, table, _T["scores"].c.sample_id, job_id, limit)
        elif table is _T["models"]:
            removed = _delete_models(session, job_id, limit)
        elif table is _T["job_prompt_sets"]:
            removed = _delete_prompt_sets(session, job_id, limit)
        else:
            removed = _delete(session, table, table.c.job_id == job_id, limit)
        if removed:
            return removed
    return 0


def _delete_with(session: Session, table: SqlTable, reference: Column[str], job_id: str, limit: int) -> int:
    """Delete up to `limit` rows of the job, with the rows whose column `reference` refers to them."""
    ids = list(session.scalars(select(table.c.id).where(table.c.job_id == job_id).limit(limit)))
    _execute(session, delete(reference.table).where(is_any_of(reference, ids)))
    _execute(session, delete(table).where(is_any_of(table.c.id, ids)))
    return len(ids)


def _delete_models(session: Session, job_id: str, limit: int) -> int:
    """Delete models, the last rounds first: each is the parent of the next."""
    query = select(Model.id).where(Model.job_id == job_id).order_by(Model.round.desc()).limit(limit)
    ids = list(session.scalars(query))
    _execute(session, delete(Model).where(is_any_of(Model.id, ids)))
    return len(ids)


def _delete_prompt_sets(session: Session, job_id: str, limit: int) -> int:
    """Delete references to prompt sets, and those prompt sets that have no name and that no job refers to any more."""
    ids = list(session.scalars(select(JobPromptSet.prompt_set_id).where(JobPromptSet.job_id == job_id).limit(limit)))
    of_job = delete(JobPromptSet).where(JobPromptSet.job_id == job_id, is_any_of(JobPromptSet.prompt_set_id, ids))
    _execute(session, of_job)
    if ids:
        prompt_sets.remove_unused(session, ids)
    return len(ids)


def is_due(session: Session, job_id: str, after_seconds: float) -> bool:
    """Whether the job was deleted long enough ago that no worker can still write objects of it."""
    query = select(Job.id).where(Job.id == job_id, Job.deleted_at <= now_seconds() - after_seconds)
    return session.scalar(query) is not None


def postpone(session: Session, job_id: str, after_seconds: float) -> None:
    """Let the last step of the removal be due this time after the deletion."""
    _execute(session, update(Job).where(Job.id == job_id).values(purge_at=Job.deleted_at + after_seconds))


def forget_skeleton(session: Session, job_id: str, limit: int) -> int:
    """Delete up to `limit` stages of a deleted job, then the job. Returns the number of rows; 0 if it is gone."""
    ids = list(session.scalars(select(Stage.id).where(Stage.job_id == job_id).limit(limit)))
    if not ids:
        return _delete(session, _T["jobs"], Job.id == job_id, 1)

    for column in (StageDependency.stage_id, StageDependency.needs_id):
        dependencies = _delete(session, _T["stage_dependencies"], is_any_of(column, ids), limit)
        if dependencies == limit:  # one stage can depend on all others
            return dependencies
    _execute(session, delete(Stage).where(is_any_of(Stage.id, ids)))
    return len(ids)


def _delete(session: Session, table: SqlTable, where: ColumnElement[bool], limit: int) -> int:
    """Delete up to `limit` rows for which the condition holds. Returns their number."""
    key = tuple_(*table.primary_key.columns)
    first = select(*table.primary_key.columns).where(where).limit(limit)
    result = session.execute(delete(table).where(key.in_(first)))
    return int(getattr(result, "rowcount", 0))


def _execute(session: Session, statement: Any) -> None:
    session.execute(statement, execution_options=UNSYNCED)
