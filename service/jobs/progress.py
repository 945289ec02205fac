"""How far a job is, from its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.db.tables import Job, Stage
from service.states import JobState, StageState

_LEAST_SHARE_FOR_ETA = 0.01


@dataclass(frozen=True)
class Progress:
    """Where a job is: its current stage with that stage's own count, and the share of the whole."""

    stage: str | None
    round: int | None
    done: int
    total: int
    percent: float
    eta_seconds: float | None


def progress_of(job: Job, stages: Sequence[Stage], now: float) -> Progress:
    """`eta_seconds` is None until enough is done to tell, and when the job has ended."""
    current = next((s for s in stages if s.state == StageState.RUNNING), None)
    share = min(1.0, sum(s.work * _share(s) for s in stages) / job.work_total)
    if job.state == JobState.SUCCEEDED:
        share = 1.0
    return Progress(
        stage=current.kind if current else None,
        round=current.round if current else max((s.round for s in stages if s.started_at is not None), default=None),
        done=current.progress_done if current else 0,
        total=current.progress_total if current else 0,
        percent=round(100 * share, 1),
        eta_seconds=_eta(job, share, now),
    )


def _share(stage: Stage) -> float:
    if stage.state == StageState.SUCCEEDED:
        return 1.0
    if stage.state != StageState.RUNNING or stage.progress_total == 0:
        return 0.0
    return min(1.0, stage.progress_done / stage.progress_total)


def _eta(job: Job, share: float, now: float) -> float | None:
    if job.finished_at is not None or job.started_at is None or share < _LEAST_SHARE_FOR_ETA:
        return None
    return round(max(0.0, (now - job.started_at) * (1 - share) / share), 1)
