"""The command `dfusion workers`."""

from __future__ import annotations

import typer

from api.cli.screens import listing, local_time, size
from api.cli.session import Session


def workers(ctx: typer.Context) -> None:
    """List the workers seen within the last day, with their stages."""
    session: Session = ctx.obj
    with session.client() as client:
        page = client.workers()

    rows = (
        (
            worker.name,
            worker.state,
            ", ".join(worker.queues),
            worker.device,
            worker.model or "",
            "" if worker.gpu_memory_bytes is None else size(worker.gpu_memory_bytes),
            "" if worker.stage is None else f"{worker.stage.kind} of {worker.stage.job.removeprefix('/jobs/')}",
            local_time(worker.seen_at),
        )
        for worker in page.data
    )
    headings = ("worker", "state", "queues", "device", "model", "GPU memory>", "stage", "seen at")
    session.show(page, lambda: listing(headings, rows))
