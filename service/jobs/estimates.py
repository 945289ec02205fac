"""Estimates of a job's time, memory and storage from past jobs of this installation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session

from service.db.queries.rows import is_any_of
from service.db.tables import WAS_TIMED, Artifact, Sample, Stage
from service.jobs.kinds.base import Checked
from service.jobs.planning import count, totals
from service.plan import Totals, WorkCounts
from service.states import QueueName, StageKind, queue_of

_LATEST = 200
"""The number of past stages of each kind, and of past samples, that an estimate uses."""
_IMAGE_KINDS = (StageKind.SAMPLE, StageKind.FUSE, StageKind.EVALUATE)


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


@dataclass(frozen=True)
class _Past:
    """The latest stages of a kind: their seconds and work in total, and their peak memory."""

    seconds: float
    work: float
    memory_bytes: int | None


def estimate_of(session: Session, checked: Checked[Any]) -> ResourceEstimate:
    """Estimate a job's resources from the latest stages of the same kinds on the same base model.

    For an evaluation of several models this is the base model of the first one. The number of rows read has a bound.
    """
    base = checked.model.base if checked.model else ""
    by_kind = totals(checked.spec, checked.sizes)
    past = {kind: _past(session, base, kind) for kind in by_kind}
    memory = [stages.memory_bytes for stages in past.values() if stages.memory_bytes is not None]
    storage = _storage_bytes(session, base, count(checked.spec, checked.sizes))
    return ResourceEstimate(_seconds(by_kind, past), max(memory, default=None), storage)


def _latest(base: str, kind: StageKind, *columns: Any) -> Select[Any]:
    """The latest stages of this kind on this base model that have succeeded."""
    loaded = "" if queue_of(kind) is QueueName.CPU else base
    query = select(*columns).where(Stage.base == loaded, Stage.kind == kind, text(WAS_TIMED))
    return query.order_by(Stage.finished_at.desc()).limit(_LATEST)


def _past(session: Session, base: str, kind: StageKind) -> _Past:
    seconds = (Stage.finished_at - Stage.started_at).label("seconds")
    latest = _latest(base, kind, seconds, Stage.work, Stage.memory_bytes).subquery().c
    sums = func.coalesce(func.sum(latest.seconds), 0.0), func.coalesce(func.sum(latest.work), 0.0)
    return _Past(*session.execute(select(*sums, func.max(latest.memory_bytes))).one())


def _seconds(by_kind: Totals, past: dict[StageKind, _Past]) -> float | None:
    """The work of each kind at the speed of its past stages. None if a kind with much work has none."""
    seconds = 0.0
    for kind, stages in by_kind.items():
        if past[kind].work:
            seconds += stages.work * past[kind].seconds / past[kind].work
        elif stages.work > stages.count:
            return None
    return round(seconds, 1)


def _storage_bytes(session: Session, base: str, counts: WorkCounts) -> int | None:
    """The bytes of all images and trajectories, from the mean sizes of samples of the latest stages."""
    # 1. samples of the latest stages
    stage_ids: list[str] = []
    for kind in _IMAGE_KINDS:
        stage_ids += session.scalars(_latest(base, kind, Stage.id))
    columns = select(Sample.image_artifact_id, Sample.trajectory_artifact_id)
    samples = session.execute(columns.where(is_any_of(Sample.stage_id, stage_ids)).limit(_LATEST)).all()
    if not samples:
        return None if counts.images else 0

    # 2. bytes per image
    images = {sample.image_artifact_id for sample in samples}
    image_bytes = _bytes_of(session, images)

    # 3. bytes per trajectory: a file holds the trajectories of several samples
    files = {sample.trajectory_artifact_id for sample in samples if sample.trajectory_artifact_id is not None}
    in_files = select(func.count()).select_from(Sample).where(is_any_of(Sample.trajectory_artifact_id, files))
    trajectories = session.scalar(in_files) or 0
    per_trajectory = _bytes_of(session, files) / trajectories if trajectories else 0

    stored_trajectories = counts.sampled + counts.fused_at_most
    return round(counts.images * image_bytes / len(images) + stored_trajectories * per_trajectory)


def _bytes_of(session: Session, artifact_ids: Collection[str]) -> int:
    total = select(func.coalesce(func.sum(Artifact.size_bytes), 0)).where(is_any_of(Artifact.id, artifact_ids))
    return session.scalar(total) or 0
