"""The progress of a job, from its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.db.tables import Job, Stage
from service.states import JobState, StageState

_MIN_SHARE_FOR_ETA = 0.01


@dataclass(frozen=True)
class Progress:
    """The progress of a job.

    Attributes:
        stage: The kind of the running stage; None if no stage runs.
        round: The round of the running stage, or else the last round that has started.
        done: Completed steps of the running stage.
        total: All steps of the running stage.
        percent: The completed share of the work of all stages.
        eta_seconds: The estimated time left. None for a job that has ended or has just started.
    """

    stage: str | None
    round: int | None
    done: int
    total: int
    percent: float
    eta_seconds: float | None


def progress_of(job: Job, stages: Sequence[Stage], now: float) -> Progress:
    """The progress of a job with these stages at the time `now`, in seconds since 1970."""
    current = next((s for s in stages if s.state == StageState.RUNNING), None)
    started_rounds = [s.round for s in stages if s.started_at is not None]
    share = min(1.0, sum(s.work * _share(s) for s in stages) / job.work_total)
    if job.state == JobState.SUCCEEDED:
        share = 1.0

    return Progress(
        stage=current.kind if current else None,
        round=current.round if current else max(started_rounds, default=None),
        done=current.progress_done if current else 0,
        total=current.progress_total if current else 0,
        percent=round(100 * share, 1),
        eta_seconds=_eta(job, share, now),
    )


def _share(stage: Stage) -> float:
    """The completed share of a stage."""
    if stage.state == StageState.SUCCEEDED:
        return 1.0
    if stage.state != StageState.RUNNING or stage.progress_total == 0:
        return 0.0
    return min(1.0, stage.progress_done / stage.progress_total)


def _eta(job: Job, share: float, now: float) -> float | None:
    if job.finished_at is not None or job.started_at is None or share < _MIN_SHARE_FOR_ETA:
        return None
    return round(max(0.0, (now - job.started_at) * (1 - share) / share), 1)
