"""Conversion of workers and their stages."""

from __future__ import annotations

from api.converters.common import utc
from api.wire.workers import WorkerOut, WorkerStageOut
from service.db.tables import Stage, Worker


def worker_out(row: Worker, stage: Stage | None, now: float, silent_after_seconds: float) -> WorkerOut:
    state = "idle" if stage is None else "working"
    if now - row.seen_at > silent_after_seconds:
        state = "silent"

    return WorkerOut(
        name=row.name,
        state=state,
        host=row.host,
        pid=row.pid,
        queues=row.queues,
        device=row.device,
        model=row.model,
        gpu_memory_bytes=row.gpu_memory_bytes,
        stage=stage and WorkerStageOut(id=stage.id, job=f"/jobs/{stage.job_id}", kind=stage.kind, round=stage.round),
        started_at=utc(row.started_at),
        seen_at=utc(row.seen_at),
    )
