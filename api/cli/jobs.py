"""Jobs: how far they are, what happened, and how to pause, resume, call off or repeat them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.live import follow_job
from api.cli.options import Follow, Key, Limit, gather
from api.cli.screens import figure, listing, moment, sheet, styled_state
from api.cli.session import INTERRUPTED, Session
from api.client import Client
from api.client.client import JobFilters
from api.experiments.tensorboard import export_tensorboard
from api.wire.jobs import JobDetail, JobOut
from service.states import JobKind, JobState

app = typer.Typer(
    no_args_is_help=True, help="Jobs: list, show, follow, pause, resume, cancel, retry, logs, metrics, TensorBoard."
)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id")]


@app.command("list")
def list_jobs(
    ctx: typer.Context,
    state: Annotated[JobState | None, typer.Option(help="Only those in this state")] = None,
    kind: Annotated[JobKind | None, typer.Option(help="Only those of this kind")] = None,
    prompt_set: Annotated[str | None, typer.Option(help="Only those on this prompt set")] = None,
    parent: Annotated[str | None, typer.Option(metavar="JOB", help="Only those that tried this one again")] = None,
    limit: Limit = 20,
) -> None:
    """Jobs, newest first.

    Example: dfusion jobs list --state running
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters = JobFilters(state=state, kind=kind, prompt_set=prompt_set, parent=parent)
        found = gather(lambda size, cursor: client.jobs_page(size, cursor, **filters), limit)
    headings = ("job", "kind", "state", "%>", "made at", "label")
    session.answer(found, lambda: listing(headings, (_row(job) for job in found.data), found.has_more))


def _row(job: JobOut) -> tuple[Any, ...]:
    percent = f"{job.progress.percent:.0f}"
    return job.id, job.kind, styled_state(job.state), percent, moment(job.created_at), job.label or ""


@app.command()
def show(ctx: typer.Context, job_id: JobId) -> None:
    """A job: its state, its stages, what it made, and what an evaluation found."""
    session: Session = ctx.obj
    with session.client() as client:
        job = client.job(job_id)
    session.answer(job, lambda: Group(job_sheet(job), Text(), _stages(job)))


@app.command()
def follow(ctx: typer.Context, job_id: JobId) -> None:
    """Show a job's progress until it has ended. Exit code 3 if it fails or is cancelled; Ctrl-C leaves it alone."""
    session: Session = ctx.obj
    with session.client() as client:
        followed(session, client, job_id)


@app.command()
def cancel(ctx: typer.Context, job_id: JobId) -> None:
    """Call a job off. It stops within a step; what it made stays."""
    session: Session = ctx.obj
    with session.client() as client:
        _answer(session, client.cancel(job_id))


@app.command()
def pause(ctx: typer.Context, job_id: JobId) -> None:
    """Stop a job within a step until it is resumed; a training keeps what it has learned."""
    session: Session = ctx.obj
    with session.client() as client:
        _answer(session, client.pause(job_id))


@app.command()
def resume(ctx: typer.Context, job_id: JobId) -> None:
    """Go on with a paused job; one that waits for verdicts goes on without those that are missing."""
    session: Session = ctx.obj
    with session.client() as client:
        _answer(session, client.resume(job_id))


@app.command()
def retry(ctx: typer.Context, job_id: JobId, follow: Follow = False, key: Key = None) -> None:
    """Ask again for what failed or was cancelled: a new job with the same request."""
    session: Session = ctx.obj
    with session.client() as client:
        job = client.retry(job_id, idempotency_key=key)
        if follow:
            followed(session, client, job.id)
        else:
            _answer(session, job)


@app.command()
def logs(ctx: typer.Context, job_id: JobId) -> None:
    """What happened to a job, a line an event."""
    session: Session = ctx.obj
    with session.client() as client:
        if session.as_json:
            found = gather(lambda size, cursor: client.events_page(job_id, size, cursor), sys.maxsize)
            session.answer(found, Text)
        else:
            typer.echo(client.logs(job_id), nl=False)


@app.command()
def metrics(ctx: typer.Context, job_id: JobId) -> None:
    """Mean scores by round, split, scorer and model."""
    session: Session = ctx.obj
    with session.client() as client:
        found = client.metrics(job_id)
    headings = ("round", "split", "scorer", "model", "images>", "mean>", "std>")
    rows = ((m.round, m.split, m.scorer, m.model, m.count, figure(m.mean), figure(m.std)) for m in found.data)
    session.answer(found, lambda: listing(headings, rows))


@app.command("export-tensorboard")
def export_events(
    ctx: typer.Context,
    job_id: JobId,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for tensorboard --logdir")] = Path("tensorboard"),
) -> None:
    """Write a job's scores, updates and pairs as TensorBoard event files to DIR/JOB.

    Example: dfusion jobs export-tensorboard job_… --out runs
    """
    session: Session = ctx.obj
    with session.client() as client:
        folder = export_tensorboard(client, job_id, out)
    session.answer({"folder": str(folder)}, lambda: Text(f"{folder}: look at it with tensorboard --logdir {out}"))


def followed(session: Session, client: Client, job_id: str) -> None:
    """Follow a job to its end and show it; exit code 3 if it did not succeed."""
    console = session.err if session.as_json else session.out
    if not session.as_json:
        console.print(f"follow later: dfusion jobs follow {job_id}", style="dim", highlight=False)
    try:
        job = follow_job(client, job_id, console)
    except KeyboardInterrupt:
        session.err.print(f"{job_id} goes on: dfusion jobs follow {job_id}, or cancel", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    session.answer(job, lambda: Group(Text(), job_sheet(job)))
    session.ended(job)


def _answer(session: Session, job: JobDetail) -> None:
    session.answer(job, lambda: job_sheet(job))


def job_sheet(job: JobDetail) -> RenderableType:
    """A job in a few lines."""
    made = ", ".join(f"{count} {what}" for what, count in job.made.items() if count)
    fields = {
        "job": job.id,
        "kind": job.kind,
        "state": styled_state(job.state),
        "label": job.label,
        "model": job.model,
        "prompts": job.prompt_set,
        "origin": job.origin,
        "made": made or None,
        "last model": job.last_model,
        "error": None if job.error is None else f"{job.error.code}: {job.error.message}",
        "asked for": moment(job.created_at),
        "ended": None if job.finished_at is None else moment(job.finished_at),
    }
    parts: list[RenderableType] = [sheet(fields)]
    if job.result is not None and job.kind is JobKind.EVALUATION:
        parts += [Text(), _evaluation(job.result)]
    return Group(*parts)


def _stages(job: JobDetail) -> RenderableType:
    headings = ("stage", "round>", "state", "done>", "attempts>", "worker")
    rows = (
        (s.kind, s.round, styled_state(s.state), f"{s.done}/{s.total}" if s.total else "", s.attempts, s.worker or "")
        for s in job.stages
    )
    return listing(headings, rows)


def _evaluation(result: dict[str, Any]) -> RenderableType:
    """Every model by every scorer, with its interval; the first is what the others are held to."""
    return listing(("model", "split", "scorer", "mean>", "interval"), _measured(result))


def _measured(result: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for split, found in result["splits"].items():
        for one in found["models"]:
            interval = " to ".join(map(figure, one["interval"] or [None]))
            yield one["model"], split, one["scorer"], figure(one["mean"]), interval
