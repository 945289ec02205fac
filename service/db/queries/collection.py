"""Queries of the collector: objects, checkpoints and trajectories that are no longer needed."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Select, delete, select, union, update
from sqlalchemy.orm import Session

from service.db.queries.rows import UNSYNCED
from service.db.tables import Artifact, Job, Pair, Sample, Stage
from service.states import FINAL_JOB_STATES, FINAL_STAGE_STATES, TRAJECTORY_READERS


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


def forget_checkpoints(session: Session, limit: int) -> list[str]:
    """Clear up to `limit` checkpoints of ended stages. Returns their keys."""
    query = select(Stage).where(Stage.state.in_(FINAL_STAGE_STATES), Stage.checkpoint_key.is_not(None)).limit(limit)
    keys = {stage.id: stage.checkpoint_key for stage in session.scalars(query)}
    clear = update(Stage).where(Stage.id.in_(keys)).values(checkpoint_key=None, checkpoint_sha256=None)
    session.execute(clear, execution_options=UNSYNCED)
    return [key for key in keys.values() if key is not None]


def forget_trajectories(session: Session, keep_pairs: bool, limit: int) -> list[str]:
    """Delete up to `limit` trajectory artifacts of ended jobs, and the references of their samples.

    Nothing is deleted while an unfinished job may read stored trajectories of other jobs.

    Args:
        session: The transaction.
        keep_pairs: Keep every file with a sample that is in a pair.
        limit: The maximum number of artifacts.

    Returns:
        The keys of the artifacts.
    """
    readers = select(Job.id).where(Job.kind.in_(TRAJECTORY_READERS), Job.state.not_in(FINAL_JOB_STATES))
    if session.scalar(readers.limit(1)) is not None:
        return []

    # 1. the artifacts
    ended = select(Job.id).where(Job.state.in_(FINAL_JOB_STATES))
    query = select(Artifact.id, Artifact.key).where(Artifact.job_id.in_(ended), Artifact.id.in_(_trajectories()))
    if keep_pairs:
        sides = (Pair.reference_id, Pair.base_id, Pair.target_id)
        in_pairs = union(*(select(side).where(side.is_not(None)) for side in sides))
        query = query.where(Artifact.id.not_in(_trajectories().where(Sample.id.in_(in_pairs))))
    keys = {row.id: row.key for row in session.execute(query.order_by(Artifact.id).limit(limit))}

    # 2. their references and rows
    samples = update(Sample).where(Sample.trajectory_artifact_id.in_(keys))
    clear = samples.values(trajectory_artifact_id=None, trajectory_row=None)
    session.execute(clear, execution_options=UNSYNCED)
    session.execute(delete(Artifact).where(Artifact.id.in_(keys)), execution_options=UNSYNCED)
    return list(keys.values())


def _trajectories() -> Select[str | None]:
    """The artifact ids of the trajectories of all samples."""
    return select(Sample.trajectory_artifact_id).where(Sample.trajectory_artifact_id.is_not(None))
