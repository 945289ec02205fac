"""The progress of a job, from the running sums of its row and its running stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.db.queries.stages import RunningStage
from service.db.tables import Job
from service.states import JobState

_MIN_SHARE_FOR_ETA = 0.01


@dataclass(frozen=True)
class Progress:
    """The progress of a job.

    Attributes:
        stage: The kind of the running stage; None if no stage runs.
        round: The round of the running stage, or else the last round that has started.
        shard: The index of the running stage among those of its kind and round; None if no stage runs.
        shards: Their number.
        done: Completed steps of the running stage.
        total: All steps of the running stage.
        percent: The completed share of the work of all stages.
        eta_seconds: The estimated time left. None for a job that rests, has ended or has just started.
    """

    stage: str | None
    round: int | None
    shard: int | None
    shards: int
    done: int
    total: int
    percent: float
    eta_seconds: float | None


def progress_of(job: Job, running: Sequence[RunningStage], now: float) -> Progress:
    """The progress of a job with these running stages at the time `now`, in seconds since 1970."""
    current = running[0] if running else None
    work = job.work_done + sum(stage.work * _share(stage) for stage in running)
    share = 1.0 if job.state == JobState.SUCCEEDED else min(1.0, work / job.work_total)

    return Progress(
        stage=current.kind if current else None,
        round=current.round if current else job.last_round,
        shard=current.shard if current else None,
        shards=current.shards if current else 0,
        done=current.done if current else 0,
        total=current.total if current else 0,
        percent=round(100 * share, 1),
        eta_seconds=_eta(job, share, now),
    )


def _share(stage: RunningStage) -> float:
    """The completed share of a stage."""
    return 0.0 if stage.total == 0 else min(1.0, stage.done / stage.total)


def _eta(job: Job, share: float, now: float) -> float | None:
    if job.rest_since is not None or job.started_at is None or share < _MIN_SHARE_FOR_ETA:
        return None
    seconds = now - job.started_at - job.rest_seconds
    return round(max(0.0, seconds * (1 - share) / share), 1)
