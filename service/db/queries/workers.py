"""Queries over workers that report themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.tables import Stage, Worker
from service.states import StageState

_FORGET_SECONDS = 24 * 3600.0


def report(
    session: Session,
    *,
    name: str,
    host: str,
    pid: int,
    queues: Sequence[str],
    device: str,
    model: str | None,
    gpu_memory_bytes: int | None = None,
) -> None:
    """The worker is there. One of the same name but another process has started anew."""
    values: dict[str, Any] = {"host": host, "pid": pid, "queues": list(queues), "device": device, "model": model}
    values["gpu_memory_bytes"] = gpu_memory_bytes
    same = update(Worker).where(Worker.name == name, Worker.host == host, Worker.pid == pid)
    if session.execute(same.values(**values, seen_at=now_seconds()).returning(Worker.name)).first() is None:
        remove(session, name)
        session.add(Worker(name=name, **values, started_at=now_seconds(), seen_at=now_seconds()))
        session.flush()


def remove(session: Session, name: str) -> None:
    """The worker has ended."""
    session.execute(delete(Worker).where(Worker.name == name))


def forget_silent(session: Session) -> None:
    """Drop the workers that were not seen for a day."""
    session.execute(delete(Worker).where(Worker.seen_at < now_seconds() - _FORGET_SECONDS))


def all_workers(session: Session) -> list[Worker]:
    """All workers, by name."""
    return list(session.scalars(select(Worker).order_by(Worker.name)))


def stages_in_work(session: Session) -> dict[str, Stage]:
    """The running stages, by the name of the worker that holds the lease."""
    running = session.scalars(select(Stage).where(Stage.state == StageState.RUNNING))
    return {stage.lease_owner: stage for stage in running if stage.lease_owner is not None}
