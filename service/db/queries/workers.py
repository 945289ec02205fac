"""Queries over the reports of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.tables import IS_RUNNING, Stage, Worker

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
    """Record the report of a worker. A report by another process replaces the row, since the worker has restarted.

    Args:
        session: The transaction.
        name: The name of the worker, which is the owner of its leases.
        host: Its machine.
        pid: Its process.
        queues: The queues that it serves.
        device: The device of its models.
        model: The loaded base model.
        gpu_memory_bytes: GPU memory that torch has reserved; None on a CPU.
    """
    values: dict[str, Any] = {
        "host": host,
        "pid": pid,
        "queues": list(queues),
        "device": device,
        "model": model,
        "gpu_memory_bytes": gpu_memory_bytes,
    }
    same_process = update(Worker).where(Worker.name == name, Worker.host == host, Worker.pid == pid)
    seen = same_process.values(**values, seen_at=now_seconds()).returning(Worker.name)
    if session.execute(seen).first() is None:
        remove(session, name)
        session.add(Worker(name=name, **values, started_at=now_seconds(), seen_at=now_seconds()))
        session.flush()


def remove(session: Session, name: str) -> None:
    """Remove the row of a worker that has ended."""
    session.execute(delete(Worker).where(Worker.name == name))


def forget_silent(session: Session) -> None:
    """Remove the rows of workers that have not reported for a day."""
    session.execute(delete(Worker).where(Worker.seen_at < now_seconds() - _FORGET_SECONDS))


def all_workers(session: Session) -> list[Worker]:
    """All workers, by name."""
    return list(session.scalars(select(Worker).order_by(Worker.name)))


def stages_in_work(session: Session) -> dict[str, Stage]:
    """The running stages, by the worker that holds the lease."""
    running = session.scalars(select(Stage).where(text(IS_RUNNING)))
    return {stage.lease_owner: stage for stage in running if stage.lease_owner is not None}
