"""Conversion of jobs, stages, events and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.converters.common import maybe_utc, utc
from api.wire.jobs import (
    BestRoundOut,
    EventOut,
    JobDetail,
    JobErrorOut,
    JobOut,
    MetricOut,
    PairingOut,
    ProgressOut,
    ReviewOut,
    StageOut,
    StoppedOut,
    TrainingOut,
)
from service.db.queries.jobs import JobView
from service.db.queries.stages import RunningStage
from service.db.queries.verdicts import ReviewProgress
from service.db.tables import Event, Job, Metric, Model, Stage
from service.jobs.progress import progress_of


def stage_out(row: Stage) -> StageOut:
    return StageOut(
        id=row.id,
        kind=row.kind,
        queue=row.queue,
        round=row.round,
        shard=row.shard,
        state=row.state,
        worker=row.lease_owner,
        done=row.progress_done,
        total=row.progress_total,
        attempts=row.attempt,
        crashes=row.crash_count,
        failures=row.failure_count,
        started_at=maybe_utc(row.started_at),
        finished_at=maybe_utc(row.finished_at),
        error=_error(row.error_code, row.error_message),
    )


def job_out(job: Job, running: Sequence[RunningStage], now: float) -> JobOut:
    return JobOut(**_job_fields(job, running, now))


def job_detail(view: JobView, review: ReviewProgress | None = None) -> JobDetail:
    """Convert a job. `review` is what it waits for."""
    job = view.job
    return JobDetail(
        **_job_fields(job, view.running, view.now),
        spec=job.spec,
        outputs={"samples": job.samples_made, "pairs": job.pairs_made, "models": job.models_made},
        last_model=view.last_model_id,
        best=None if job.best is None else BestRoundOut(**job.best),
        review=None if review is None else _review(job.id, review),
        result=job.result,
    )


def _review(job_id: str, progress: ReviewProgress) -> ReviewOut:
    href = f"/pairs?job={job_id}&round={progress.round}&in_review=true"
    return ReviewOut(round=progress.round, pairs=progress.pairs, judged=progress.judged, href=href)


def _job_fields(job: Job, running: Sequence[RunningStage], now: float) -> dict[str, Any]:
    progress = progress_of(job, running, now)

    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "label": job.label,
        "priority": job.priority,
        "rounds": job.rounds,
        "model": job.model_id,
        "prompt_set": job.prompt_set_id,
        "held_out_prompt_set": job.held_out_prompt_set_id,
        "origin": job.origin_id,
        "progress": ProgressOut(**progress.__dict__),
        "attempts": max([job.attempts, *(stage.attempt for stage in running)]),
        "storage_bytes": job.storage_bytes,
        "error": _error(job.error_code, job.error_message),
        "stopped": None if job.stopped is None else StoppedOut(**job.stopped),
        "created_at": utc(job.created_at),
        "started_at": maybe_utc(job.started_at),
        "finished_at": maybe_utc(job.finished_at),
        "links": {
            "self": f"/jobs/{job.id}",
            "stages": f"/jobs/{job.id}/stages",
            "events": f"/jobs/{job.id}/events",
            "logs": f"/jobs/{job.id}/logs",
            "metrics": f"/jobs/{job.id}/metrics",
            "samples": f"/samples?job={job.id}",
            "pairs": f"/pairs?job={job.id}",
            "models": f"/models?job={job.id}",
            "cancel": f"/jobs/{job.id}/cancel",
            "pause": f"/jobs/{job.id}/pause",
            "resume": f"/jobs/{job.id}/resume",
            "skip-review": f"/jobs/{job.id}/skip-review",
        },
    }


def _error(code: str | None, message: str | None) -> JobErrorOut | None:
    return None if code is None else JobErrorOut(code=code, message=message or "")


def event_out(row: Event) -> EventOut:
    return EventOut(
        id=row.id, created_at=utc(row.at), kind=row.kind, message=row.message, stage=row.stage_id, data=row.data
    )


def metric_out(row: Metric, images_per_round: int) -> MetricOut:
    trained_rounds = row.round - 1 if row.split == "rollout" else row.round
    return MetricOut(
        round=row.round,
        split=row.split,
        scorer=row.scorer,
        version=row.version,
        model=row.model_id,
        training_images=trained_rounds * images_per_round,
        count=row.count,
        mean=row.mean,
        std=row.std,
    )


def pairing_out(row: Event) -> PairingOut:
    data = row.data
    return PairingOut(
        round=data["round"],
        pairs=data["pairs"],
        samples=data["samples"],
        without_pair=data["prompts_without_pair"],
    )


def training_out(row: Model) -> TrainingOut:
    statistics = row.statistics

    return TrainingOut(
        round=row.round or 0,
        model=row.id,
        examples=statistics.get("examples", 0),
        updates=statistics.get("updates", 0),
        loss=statistics.get("last_loss"),
        accuracy=statistics.get("last_accuracy"),
        log_ratio_preferred=statistics.get("last_log_ratio_preferred"),
        log_ratio_rejected=statistics.get("last_log_ratio_rejected"),
        below_epsilon=statistics.get("last_below_epsilon"),
        grad_norm=statistics.get("last_grad_norm"),
        rows_per_second=statistics.get("rows_per_second"),
    )
