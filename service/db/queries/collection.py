"""Queries of the collector: leftover objects, checkpoints and trajectories that are no longer needed.

Each query reads and writes a bounded number of rows, regardless of the size of the tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, delete, func, not_, select, text, tuple_, union, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries import jobs
from service.db.queries.rows import UNSYNCED, is_any_of
from service.db.tables import HAS_CHECKPOINT, IS_UNCOLLECTED, JOB_HAS_ENDED, Artifact, Job, Pair, Sample, Stage
from service.states import FINAL_JOB_STATES, FINAL_STAGE_STATES, JobKind, JobState, StageState

Position = tuple[float, str]
"""The end and the id of the last row of a page."""
START: Position = (-1.0, "")
"""The position before the first row."""
_UNFINISHED = frozenset(JobState) - FINAL_JOB_STATES
_SIDES = (Pair.reference_id, Pair.base_id, Pair.target_id)


@dataclass(frozen=True)
class EndedStage:
    """A stage whose leftover objects are due to be removed.

    Attributes:
        job_id: Its job.
        stage_id: Its id.
        position: Its position in the order of collection.
    """

    job_id: str
    stage_id: str
    position: Position


@dataclass(frozen=True)
class TrajectoryFile:
    """A stored file of trajectories."""

    artifact_id: str
    stage_id: str
    key: str


@dataclass(frozen=True)
class TrajectoryPage:
    """A page of a job's artifacts.

    Attributes:
        last_id: The last artifact of the page; None if there is none.
        files: Its files of trajectories that are not kept.
    """

    last_id: str | None
    files: list[TrajectoryFile]


# leftover objects


def uncollected_stages(session: Session, ended_by: float, after: Position, limit: int) -> list[EndedStage]:
    """Stages that ended by this time and may have leftover objects, in the order in which they ended."""
    query = select(Stage.job_id, Stage.id, Stage.finished_at).where(
        text(IS_UNCOLLECTED),
        tuple_(Stage.finished_at, Stage.id) > tuple_(*after),
        Stage.finished_at <= ended_by,
        Stage.state.in_(FINAL_STAGE_STATES),
    )
    rows = session.execute(query.order_by(Stage.finished_at, Stage.id).limit(limit))
    return [EndedStage(row.job_id, row.id, (row.finished_at, row.id)) for row in rows]


def mark_collected(session: Session, stages: Iterable[EndedStage], listed_at: float) -> None:
    """Mark stages whose objects were listed after this time. One that has ended again since then stays uncollected."""
    ids = [stage.stage_id for stage in stages]
    _execute(session, update(Stage).where(is_any_of(Stage.id, ids)).values(collected_at=listed_at))


def unreferenced(session: Session, stages: Mapping[str, str]) -> set[str]:
    """The keys of ended stages that no row references.

    An ended stage writes no more rows, so its unreferenced keys stay unreferenced. The states must therefore be read
    before the references. Keys of unknown stages are left out: the database may be the wrong one or an older backup.

    Args:
        session: A view of the database.
        stages: The keys to check, with the stages that wrote them.
    """
    stage_ids = set(stages.values())
    ended = set(session.scalars(select(Stage.id).where(Stage.id.in_(stage_ids), Stage.state.in_(FINAL_STAGE_STATES))))

    referenced = set(session.scalars(select(Artifact.key).where(Artifact.key.in_(stages.keys()))))
    referenced |= set(session.scalars(select(Stage.checkpoint_key).where(Stage.id.in_(stage_ids))))
    return {key for key, stage_id in stages.items() if stage_id in ended} - referenced


# checkpoints


def forget_checkpoints(session: Session, keep_failed_seconds: float, limit: int) -> list[str]:
    """Clear up to `limit` checkpoints of ended stages, whose objects become leftovers. Returns their keys.

    Those of stages that have failed stay for `keep_failed_seconds`, for a job that is continued.
    """
    # 1. the stages, and the locks of their jobs in a fixed order
    needed = and_(Stage.state == StageState.FAILED, Stage.finished_at > now_seconds() - keep_failed_seconds)
    ended = (text(HAS_CHECKPOINT), Stage.state.in_(FINAL_STAGE_STATES), not_(needed))
    first = session.execute(select(Stage.id, Stage.job_id).where(*ended).order_by(Stage.id).limit(limit)).all()
    if not first:
        return []
    _lock_jobs(session, {row.job_id for row in first})

    # 2. those that still have a checkpoint, unless their job was continued meanwhile
    columns = (Stage.id, Stage.job_id, Stage.checkpoint_key, Stage.checkpoint_bytes)
    rows = session.execute(select(*columns).where(is_any_of(Stage.id, {row.id for row in first}), *ended)).all()
    cleared = {"checkpoint_key": None, "checkpoint_sha256": None, "checkpoint_bytes": 0, "collected_at": None}
    _execute(session, update(Stage).where(is_any_of(Stage.id, {row.id for row in rows})).values(cleared))
    for row in rows:
        _release_bytes(session, row.job_id, row.checkpoint_bytes)
    return [row.checkpoint_key for row in rows]


# trajectories


def unfinished_jobs(session: Session, kinds: Collection[JobKind]) -> set[str]:
    """The unfinished jobs of these kinds."""
    query = select(Job.id).where(Job.state.in_(_UNFINISHED), Job.kind.in_(kinds))
    return set(session.scalars(query))


def jobs_of_samples(session: Session, sample_ids: Collection[str]) -> set[str]:
    """The jobs that sampled these samples."""
    return set(session.scalars(select(Sample.job_id).where(is_any_of(Sample.id, sample_ids)).distinct()))


def jobs_of_pairs(session: Session, pair_ids: Collection[str]) -> set[str]:
    """The jobs that sampled the references, bases and targets of these pairs."""
    queries = [
        select(Sample.job_id).join(Pair, side == Sample.id).where(is_any_of(Pair.id, pair_ids)) for side in _SIDES
    ]
    return set(session.scalars(union(*queries)))


def next_job_to_prune(
    session: Session, keep: str, keep_failed_seconds: float, after: Position, excluded: Collection[str]
) -> Position | None:
    """The next ended job whose trajectories this setting `keep_trajectories` may remove.

    Args:
        session: A view of the database.
        keep: "pairs" or "none".
        keep_failed_seconds: How long the trajectories of a failed job stay, for a job that is continued.
        after: The position of the previous job.
        excluded: Jobs to skip.
    """
    query = select(Job.id, Job.finished_at).where(
        text(JOB_HAS_ENDED),
        tuple_(Job.finished_at, Job.id) > tuple_(*after),
        not_(and_(Job.state == JobState.FAILED, Job.finished_at > now_seconds() - keep_failed_seconds)),
        ~is_any_of(Job.id, excluded),
    )
    # each mark is a range of the index
    marks = [Job.trajectories_kept == kept for kept in (("all", "pairs") if keep == "none" else ("all",))]
    first = [session.execute(query.where(mark).order_by(Job.finished_at, Job.id).limit(1)).first() for mark in marks]
    return min(((row.finished_at, row.id) for row in first if row is not None), default=None)


def trajectory_page(session: Session, job_id: str, keep: str, after: str, limit: int) -> TrajectoryPage:
    """The files of trajectories among the next `limit` artifacts of a job, without those that `keep` keeps.

    Args:
        session: A view of the database.
        job_id: The job.
        keep: "pairs" keeps every file with a sample that is in a pair; "none" keeps none.
        after: The last artifact of the previous page; "" for the first page.
        limit: The number of artifacts to read.
    """
    artifacts = select(Artifact.id, Artifact.stage_id, Artifact.key).where(Artifact.job_id == job_id)
    page = session.execute(artifacts.where(Artifact.id > after).order_by(Artifact.id).limit(limit)).all()
    if not page:
        return TrajectoryPage(None, [])

    removed = set(session.scalars(_with_samples({row.id for row in page})))
    if keep == "pairs" and removed:
        in_pairs = [_with_samples(removed).join(Pair, side == Sample.id) for side in _SIDES]
        removed -= set(session.scalars(union(*in_pairs)))
    files = [TrajectoryFile(row.id, row.stage_id, row.key) for row in page if row.id in removed]
    return TrajectoryPage(page[-1].id, files)


def forget_trajectories(
    session: Session, job_id: str, files: Collection[TrajectoryFile], limit: int
) -> list[str] | None:
    """Delete the artifacts of these files, whose objects become leftovers, and the references of their samples.

    Args:
        session: The transaction.
        job_id: The job of the files.
        files: The files.
        limit: The maximum number of samples whose references are deleted. The artifacts of the other samples stay.

    Returns:
        The keys of the deleted artifacts; None if the job has not ended.
    """
    if jobs.lock(session, job_id).state not in FINAL_JOB_STATES:
        return None

    # 1. the references
    file_ids = {file.artifact_id for file in files}
    samples = select(Sample.id).where(is_any_of(Sample.trajectory_artifact_id, file_ids)).limit(limit)
    no_trajectory = {"trajectory_artifact_id": None, "trajectory_row": None}
    _execute(session, update(Sample).where(is_any_of(Sample.id, session.scalars(samples))).values(no_trajectory))

    # 2. the artifacts without references
    removed = file_ids - set(session.scalars(_with_samples(file_ids)))
    total = select(func.coalesce(func.sum(Artifact.size_bytes), 0)).where(is_any_of(Artifact.id, removed))
    _release_bytes(session, job_id, session.scalars(total).one())
    _execute(session, delete(Artifact).where(is_any_of(Artifact.id, removed)))

    # 3. the stages, which have leftover objects until these are removed
    stage_ids = {file.stage_id for file in files if file.artifact_id in removed}
    _execute(session, update(Stage).where(is_any_of(Stage.id, stage_ids)).values(collected_at=None))
    return [file.key for file in files if file.artifact_id in removed]


def mark_pruned(session: Session, job: Position, keep: str) -> None:
    """Mark the trajectories of a job as removed by this setting, unless it has not ended or has ended again."""
    finished_at, job_id = job
    same = (Job.id == job_id, Job.finished_at == finished_at, Job.state.in_(FINAL_JOB_STATES))
    _execute(session, update(Job).where(*same).values(trajectories_kept=keep))


def _with_samples(artifact_ids: Collection[str]) -> Select[Any]:
    """Those of these artifacts that are trajectories of samples."""
    return (
        select(Sample.trajectory_artifact_id).where(is_any_of(Sample.trajectory_artifact_id, artifact_ids)).distinct()
    )


def _lock_jobs(session: Session, job_ids: Collection[str]) -> None:
    """Lock the rows of these jobs until the transaction ends."""
    session.execute(select(Job.id).where(is_any_of(Job.id, job_ids)).order_by(Job.id).with_for_update(key_share=True))


def _release_bytes(session: Session, job_id: str, count: int) -> None:
    """Subtract removed bytes from those that the job stores. The row of the job must be locked."""
    _execute(session, update(Job).where(Job.id == job_id).values(storage_bytes=Job.storage_bytes - count))


def _execute(session: Session, statement: Any) -> None:
    session.execute(statement, execution_options=UNSYNCED)
