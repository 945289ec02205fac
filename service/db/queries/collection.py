"""Queries of the collector: what no row needs any more."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Select, delete, select, union, update
from sqlalchemy.orm import Session

from service.db.tables import Artifact, Job, Pair, Sample, Stage
from service.states import FINAL_JOB_STATES, FINAL_STAGE_STATES, TRAJECTORY_READERS

_UNSYNCHRONISED = {"synchronize_session": False}


def unreferenced(session: Session, stages: Mapping[str, str]) -> set[str]:
    """Those of these keys (by key the stage that made it) whose stage has ended and that no row names.

    An ended stage writes no rows, so what is unnamed now stays so. It matters that the states are read first. Objects
    of unknown stages are not ours to judge: the database may be the wrong one, or older than they are.
    """
    ids = set(stages.values())
    ended = set(session.scalars(select(Stage.id).where(Stage.id.in_(ids), Stage.state.in_(FINAL_STAGE_STATES))))
    named = set(session.scalars(select(Artifact.key).where(Artifact.key.in_(stages.keys()))))
    named |= set(session.scalars(select(Stage.checkpoint_key).where(Stage.id.in_(ids))))
    return {key for key, stage_id in stages.items() if stage_id in ended} - named


def forget_checkpoints(session: Session, limit: int) -> list[str]:
    """The keys of so many checkpoints of ended stages, which name them no more."""
    query = select(Stage).where(Stage.state.in_(FINAL_STAGE_STATES), Stage.checkpoint_key.is_not(None)).limit(limit)
    found = {stage.id: stage.checkpoint_key for stage in session.scalars(query)}
    clear = update(Stage).where(Stage.id.in_(found)).values(checkpoint_key=None, checkpoint_sha256=None)
    session.execute(clear, execution_options=_UNSYNCHRONISED)
    return [key for key in found.values() if key is not None]


def forget_trajectories(session: Session, keep_pairs: bool, limit: int) -> list[str]:
    """The keys of so many files of trajectories of ended jobs, whose artifacts are gone and whose samples name none.

    With `keep_pairs`, files with a sample in a pair stay whole. None goes while a job waits or runs that may work on
    stored trajectories of others.
    """
    using = select(Job.id).where(Job.kind.in_(TRAJECTORY_READERS), Job.state.not_in(FINAL_JOB_STATES))
    if session.scalar(using.limit(1)) is not None:
        return []
    ended = select(Job.id).where(Job.state.in_(FINAL_JOB_STATES))
    query = select(Artifact.id, Artifact.key).where(Artifact.job_id.in_(ended), Artifact.id.in_(_trajectories()))
    if keep_pairs:
        sides = (Pair.reference_id, Pair.base_id, Pair.target_id)
        in_pairs = union(*(select(side).where(side.is_not(None)) for side in sides))
        query = query.where(Artifact.id.not_in(_trajectories().where(Sample.id.in_(in_pairs))))
    found = {row.id: row.key for row in session.execute(query.order_by(Artifact.id).limit(limit))}
    samples = update(Sample).where(Sample.trajectory_artifact_id.in_(found))
    forget = samples.values(trajectory_artifact_id=None, trajectory_row=None)
    session.execute(forget, execution_options=_UNSYNCHRONISED)
    session.execute(delete(Artifact).where(Artifact.id.in_(found)), execution_options=_UNSYNCHRONISED)
    return list(found.values())


def _trajectories() -> Select[str | None]:
    """The artifacts of all samples' trajectories."""
    return select(Sample.trajectory_artifact_id).where(Sample.trajectory_artifact_id.is_not(None))
