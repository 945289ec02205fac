"""Workers and their current stages."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class WorkerStageOut(BaseModel):
    """The stage that a worker runs."""

    id: str
    job: str
    kind: str
    round: int


class WorkerOut(BaseModel):
    """A worker. `state`: idle, working, or silent (it has stopped reporting)."""

    name: str
    state: str
    host: str
    pid: int
    queues: list[str]
    device: str
    model: str | None
    gpu_memory_bytes: int | None
    stage: WorkerStageOut | None
    started_at: datetime
    seen_at: datetime


class WorkersOut(BaseModel):
    """All workers."""

    data: list[WorkerOut]
