"""Estimates of a job's time, memory and storage from past jobs of this installation."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from service.db.tables import Artifact, Job, Sample, Stage
from service.jobs.kinds import JobSpec
from service.jobs.planning import count, totals
from service.plan import Sizes
from service.states import StageKind, StageState

_LATEST = 200
"""The number of past stages and samples that an estimate uses."""


@dataclass(frozen=True)
class ResourceEstimate:
    """The resources of a job. A field is None if this installation has no comparable past job.

    Attributes:
        seconds: Time on one worker.
        memory_bytes: Peak memory of one worker.
        storage_bytes: Bytes of images and trajectories.
    """

    seconds: float | None
    memory_bytes: int | None
    storage_bytes: int | None


def estimate_of(session: Session, spec: JobSpec, sizes: Sizes) -> ResourceEstimate:
    """Estimate a job's resources.

    Time comes from the latest stages of the same kinds; memory and storage from those on the same base model.
    """
    by_kind = totals(spec, sizes)
    rates = _seconds_per_work(session)
    timed_kinds = {kind for kind, stages in by_kind.items() if stages.work > stages.count}
    seconds = None
    if timed_kinds <= rates.keys():
        seconds = round(sum(stages.work * rates.get(kind, 0.0) for kind, stages in by_kind.items()), 1)

    memory_bytes = _memory_bytes(session, spec, set(by_kind))
    return ResourceEstimate(seconds, memory_bytes, _storage_bytes(session, spec, sizes))


def _seconds_per_work(session: Session) -> dict[str, float]:
    """Seconds per U-Net evaluation by kind of stage, over the latest stages that succeeded."""
    latest = (
        select(Stage.kind, Stage.work, (Stage.finished_at - Stage.started_at).label("seconds"))
        .where(Stage.state == StageState.SUCCEEDED, Stage.started_at.is_not(None), Stage.work > 0)
        .order_by(Stage.finished_at.desc())
        .limit(_LATEST)
        .subquery()
    )
    rows = session.execute(select(latest.c.kind, func.sum(latest.c.seconds), func.sum(latest.c.work)).group_by("kind"))
    return {kind: seconds / work for kind, seconds, work in rows if work}


def _same_model(spec: JobSpec) -> list[ColumnElement[bool]]:
    """The condition for jobs on the same model; no condition if the spec names none or several."""
    model = getattr(spec, "model", None)
    return [] if model is None else [Job.spec["model"].as_string() == model]


def _memory_bytes(session: Session, spec: JobSpec, kinds: set[StageKind]) -> int | None:
    """The peak memory of the latest stages of these kinds."""
    latest = (
        select(Stage.memory_bytes)
        .join(Job, Job.id == Stage.job_id)
        .where(*_same_model(spec), Stage.kind.in_(kinds), Stage.memory_bytes.is_not(None))
        .order_by(Stage.finished_at.desc())
        .limit(_LATEST)
        .subquery()
    )
    peak: int | None = session.scalar(select(func.max(latest.c.memory_bytes)))
    return peak


def _storage_bytes(session: Session, spec: JobSpec, sizes: Sizes) -> int | None:
    """The bytes of all images and trajectories, from the mean sizes of the latest samples."""
    # 1. the latest samples of the same model
    counts = count(spec, sizes)
    samples = session.execute(
        select(Sample.image_artifact_id, Sample.trajectory_artifact_id)
        .join(Job, Job.id == Sample.job_id)
        .where(*_same_model(spec))
        .order_by(Sample.id.desc())
        .limit(_LATEST)
    ).all()
    if not samples:
        return None if counts.images else 0

    # 2. bytes per image
    total_bytes = select(func.coalesce(func.sum(Artifact.size_bytes), 0))
    images = {sample.image_artifact_id for sample in samples}
    image_bytes = session.scalar(total_bytes.where(Artifact.id.in_(images))) or 0

    # 3. bytes per trajectory: a file holds the trajectories of several samples
    files = {sample.trajectory_artifact_id for sample in samples if sample.trajectory_artifact_id is not None}
    file_bytes = session.scalar(total_bytes.where(Artifact.id.in_(files))) or 0
    in_files = select(func.count()).select_from(Sample).where(Sample.trajectory_artifact_id.in_(files))
    trajectories = session.scalar(in_files) or 0
    per_trajectory = file_bytes / trajectories if trajectories else 0

    stored_trajectories = counts.sampled + counts.fused_at_most
    return round(counts.images * image_bytes / len(images) + stored_trajectories * per_trajectory)
