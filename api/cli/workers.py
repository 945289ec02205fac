"""`dfusion workers`."""

from __future__ import annotations

import typer

from api.cli.screens import listing, moment, size
from api.cli.session import Session


def workers(ctx: typer.Context) -> None:
    """The workers that were seen within a day, and what they do."""
    session: Session = ctx.obj
    with session.client() as client:
        found = client.workers()
    rows = (
        (
            one.name,
            one.state,
            ", ".join(one.queues),
            one.device,
            one.model or "",
            "" if one.gpu_memory_bytes is None else size(one.gpu_memory_bytes),
            "" if one.stage is None else f"{one.stage.kind} of {one.stage.job.removeprefix('/jobs/')}",
            moment(one.seen_at),
        )
        for one in found.data
    )
    headings = ("worker", "state", "queues", "device", "model", "GPU memory>", "stage", "seen at")
    session.answer(found, lambda: listing(headings, rows))
