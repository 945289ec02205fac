"""What a job may take (time, memory, storage), judged by what this installation's own past jobs took."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from service.db.tables import Artifact, Job, Sample, Stage
from service.jobs.kinds import JobSpec
from service.jobs.planning import count, plan_round, plan_start, rounds_of
from service.plan import PlannedStage, Sizes
from service.states import StageKind, StageState

_LATEST = 200
"""Stages and samples of the past that are looked at."""


@dataclass(frozen=True)
class ResourceEstimate:
    """Seconds and memory on one worker, and bytes stored; None where nothing of the kind was done here before."""

    seconds: float | None
    memory_bytes: int | None
    storage_bytes: int | None


def estimate_of(session: Session, spec: JobSpec, sizes: Sizes) -> ResourceEstimate:
    """What the job may take, from the latest stages of the same kinds, stages and samples of the same base."""
    plan = _whole_plan(spec, sizes)
    known = _seconds_per_work(session)
    kinds = {stage.kind for stage in plan if stage.work > 1}
    seconds = sum(stage.work * known.get(stage.kind, 0.0) for stage in plan) if kinds <= known.keys() else None
    memory = _memory(session, spec, {stage.kind for stage in plan})
    return ResourceEstimate(None if seconds is None else round(seconds, 1), memory, _bytes(session, spec, sizes))


def _whole_plan(spec: JobSpec, sizes: Sizes) -> list[PlannedStage]:
    plan = plan_start(spec, sizes)
    return plan + plan_round(spec, 2, sizes) * max(0, rounds_of(spec) - 1)


def _seconds_per_work(session: Session) -> dict[str, float]:
    """By kind of stage, over the latest that succeeded."""
    latest = (
        select(Stage.kind, Stage.work, (Stage.finished_at - Stage.started_at).label("seconds"))
        .where(Stage.state == StageState.SUCCEEDED, Stage.started_at.is_not(None), Stage.work > 0)
        .order_by(Stage.finished_at.desc())
        .limit(_LATEST)
        .subquery()
    )
    rows = session.execute(select(latest.c.kind, func.sum(latest.c.seconds), func.sum(latest.c.work)).group_by("kind"))
    return {kind: seconds / work for kind, seconds, work in rows if work}


def _of_base(spec: JobSpec) -> list[ColumnElement[bool]]:
    """Which jobs are of the same base model; all, where the job names none or several."""
    base = getattr(spec, "model", None)
    return [] if base is None else [Job.spec["model"].as_string() == base]


def _memory(session: Session, spec: JobSpec, kinds: set[StageKind]) -> int | None:
    """The most that one of the latest stages of these kinds took."""
    latest = select(Stage.memory_bytes).join(Job, Job.id == Stage.job_id).where(*_of_base(spec))
    latest = latest.where(Stage.kind.in_(kinds), Stage.memory_bytes.is_not(None))
    newest = latest.order_by(Stage.finished_at.desc()).limit(_LATEST).subquery()
    found: int | None = session.scalar(select(func.max(newest.c.memory_bytes)))
    return found


def _bytes(session: Session, spec: JobSpec, sizes: Sizes) -> int | None:
    """Images and trajectories of all samples, by what the latest samples of the same base model took each."""
    counts = count(spec, sizes)
    latest = select(Sample.image_artifact_id, Sample.trajectory_artifact_id).join(Job, Job.id == Sample.job_id)
    latest = latest.where(*_of_base(spec))
    rows = session.execute(latest.order_by(Sample.id.desc()).limit(_LATEST)).all()
    if not rows:
        return None if counts.images else 0
    images = {row.image_artifact_id for row in rows}
    files = {row.trajectory_artifact_id for row in rows if row.trajectory_artifact_id is not None}
    size = select(func.coalesce(func.sum(Artifact.size_bytes), 0))
    per_image = session.scalar(size.where(Artifact.id.in_(images))) or 0
    whole = select(func.count()).select_from(Sample).where(Sample.trajectory_artifact_id.in_(files))
    of_files, samples = session.scalar(size.where(Artifact.id.in_(files))) or 0, session.scalar(whole) or 0
    per_trajectory = of_files / samples if samples else 0
    kept = counts.sampled + counts.fused_at_most
    return round(counts.images * per_image / len(images) + kept * per_trajectory)
