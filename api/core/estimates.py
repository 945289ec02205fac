"""How long a job may take and what it may store, judged by what this installation's own past jobs took."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.core.planning import PlannedStage, Sizes, count, plan_round, plan_start
from api.core.specs import JobSpec, RoundSpec
from api.core.states import StageState
from api.core.tables import Artifact, Job, Sample, Stage

_LATEST = 200
"""Stages and samples of the past that are looked at."""


@dataclass(frozen=True)
class Estimate:
    """Seconds on one worker, and bytes; None where nothing of the kind was done here before."""

    seconds: float | None
    storage_bytes: int | None


def estimate_of(session: Session, spec: JobSpec, sizes: Sizes) -> Estimate:
    """What the job may take, from the latest stages of the same kinds and the latest samples of the same base."""
    plan = _whole_plan(spec, sizes)
    known = _seconds_per_work(session)
    kinds = {stage.kind for stage in plan if stage.work > 1}
    seconds = sum(stage.work * known.get(stage.kind, 0.0) for stage in plan) if kinds <= known.keys() else None
    return Estimate(None if seconds is None else round(seconds, 1), _bytes(session, spec, sizes))


def _whole_plan(spec: JobSpec, sizes: Sizes) -> list[PlannedStage]:
    plan = plan_start(spec, sizes)
    if isinstance(spec, RoundSpec) and spec.rounds > 1:
        plan += plan_round(spec, 2, sizes) * (spec.rounds - 1)
    return plan


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


def _bytes(session: Session, spec: JobSpec, sizes: Sizes) -> int | None:
    """Images and trajectories of all samples, by what the latest samples of the same base model took each."""
    counts = count(spec, sizes)
    latest = select(Sample.image_artifact_id, Sample.trajectory_artifact_id).join(Job, Job.id == Sample.job_id)
    base = getattr(spec, "model", None)
    if base is not None:
        latest = latest.where(Job.spec["model"].as_string() == base)
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
