"""Commands for jobs: progress, stages, events, pause, resume, cancel, retry and delete."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.live import follow_job, position
from api.cli.options import CreatedAfter, CreatedBefore, Follow, Key, Limit, fetch_pages, with_zone
from api.cli.screens import figure, listing, local_time, sheet, size, styled_state
from api.cli.session import INTERRUPTED, Session
from service.states import JobKind, JobState, Split, StageKind, StageState

if TYPE_CHECKING:
    from api.client import Client
    from api.client.client import JobFilters, StageFilters
    from api.wire.jobs import BestRoundOut, JobDetail, JobOut, StageOut, StoppedOut

app = typer.Typer(
    no_args_is_help=True,
    help="Jobs: list, show, stages, follow, change, delete, logs, metrics, report, TensorBoard.",
)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id")]


@app.command("list")
def list_jobs(
    ctx: typer.Context,
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state; can be repeated")] = None,
    kind: Annotated[list[JobKind] | None, typer.Option(help="Only jobs of this kind; can be repeated")] = None,
    prompt_set: Annotated[str | None, typer.Option(help="Only jobs on this prompt set")] = None,
    origin: Annotated[str | None, typer.Option(metavar="JOB", help="Only retries of this job")] = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    limit: Limit = 20,
) -> None:
    """List jobs, newest first.

    Examples:
      dfusion jobs list --state running --state queued
      dfusion jobs list --created-after 2026-01-31
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters: JobFilters = {
            "state": state,
            "kind": kind,
            "prompt_set": prompt_set,
            "origin": origin,
            "created_after": with_zone(created_after),
            "created_before": with_zone(created_before),
        }
        page = fetch_pages(lambda size, cursor: client.jobs_page(size, cursor, **filters), limit)

    headings = ("job", "kind", "state", "%>", "storage>", "created at", "label")
    session.show(page, lambda: listing(headings, map(_row, page.data), page.has_more))


def _row(job: JobOut) -> tuple[Any, ...]:
    percent = f"{job.progress.percent:.0f}"
    stored = size(job.storage_bytes)
    return job.id, job.kind, styled_state(job.state), percent, stored, local_time(job.created_at), job.label or ""


@app.command()
def show(ctx: typer.Context, job_id: JobId) -> None:
    """Show a job: its state, its progress, its outputs and the results of an evaluation."""
    session: Session = ctx.obj
    with session.client() as client:
        _show_job(session, client.job(job_id))


@app.command()
def stages(
    ctx: typer.Context,
    job_id: JobId,
    state: Annotated[list[StageState] | None, typer.Option(help="Only stages in this state; can be repeated")] = None,
    kind: Annotated[list[StageKind] | None, typer.Option(help="Only stages of this kind; can be repeated")] = None,
    round_number: Annotated[int | None, typer.Option("--round", help="Only stages of this round")] = None,
    with_error: Annotated[bool, typer.Option(help="Only stages whose last attempt has failed")] = False,
    limit: Limit = 50,
) -> None:
    """List the stages of a job, in order.

    Example: dfusion jobs stages JOB --state running
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters: StageFilters = {"state": state, "kind": kind, "round": round_number, "with_error": with_error}
        page = fetch_pages(lambda size, cursor: client.stages_page(job_id, size, cursor, **filters), limit)

    headings = ("stage", "round>", "shard>", "state", "done>", "attempts>", "worker")
    session.show(page, lambda: listing(headings, map(_stage_row, page.data), page.has_more))


def _stage_row(stage: StageOut) -> tuple[Any, ...]:
    done = f"{stage.done}/{stage.total}" if stage.total else ""
    state = styled_state(stage.state)
    return stage.kind, stage.round, stage.shard, state, done, stage.attempts, stage.worker or ""


@app.command()
def follow(ctx: typer.Context, job_id: JobId) -> None:
    """Show a job's progress until it ends. Ctrl-C does not stop the job.

    Exit code 3 if the job fails or is cancelled.
    """
    session: Session = ctx.obj
    with session.client() as client:
        follow_to_end(session, client, job_id)


@app.command()
def cancel(ctx: typer.Context, job_id: JobId) -> None:
    """Cancel a job. It stops within a denoising step or update; its outputs are kept."""
    session: Session = ctx.obj
    with session.client() as client:
        _show_job(session, client.cancel(job_id))


@app.command()
def delete(
    ctx: typer.Context, job_ids: Annotated[list[str], typer.Argument(metavar="JOB", help="The jobs' ids")]
) -> None:
    """Delete jobs that have ended, with their samples, pairs, models and files.

    A job whose results another job or an alias uses cannot be deleted. Example: dfusion jobs delete JOB JOB
    """
    session: Session = ctx.obj
    with session.client() as client:
        for job_id in job_ids:
            client.delete_job(job_id)
    session.show(None, lambda: Text(f"deleted {', '.join(job_ids)}"))


@app.command()
def pause(ctx: typer.Context, job_id: JobId) -> None:
    """Pause a job. It stops within a denoising step or update; a training keeps its progress."""
    session: Session = ctx.obj
    with session.client() as client:
        _show_job(session, client.pause(job_id))


@app.command()
def resume(ctx: typer.Context, job_id: JobId) -> None:
    """Resume a paused job."""
    session: Session = ctx.obj
    with session.client() as client:
        _show_job(session, client.resume(job_id))


@app.command("skip-review")
def skip_review(ctx: typer.Context, job_id: JobId) -> None:
    """End the review of a job that waits for verdicts. It continues without the missing ones."""
    session: Session = ctx.obj
    with session.client() as client:
        _show_job(session, client.skip_review(job_id))


@app.command()
def retry(ctx: typer.Context, job_id: JobId, follow: Follow = False, key: Key = None) -> None:
    """Retry a failed or cancelled job: creates a new job with the same request."""
    session: Session = ctx.obj
    with session.client() as client:
        job = client.retry(job_id, idempotency_key=key)
        if follow:
            follow_to_end(session, client, job.id)
        else:
            _show_job(session, job)


@app.command("continue")
def continue_job(ctx: typer.Context, job_id: JobId, follow: Follow = False) -> None:
    """Continue a failed or cancelled job with the stages that have not succeeded."""
    session: Session = ctx.obj
    with session.client() as client:
        job = client.continue_job(job_id)
        if follow:
            follow_to_end(session, client, job.id)
        else:
            _show_job(session, job)


@app.command()
def logs(ctx: typer.Context, job_id: JobId) -> None:
    """Show a job's events, one per line."""
    session: Session = ctx.obj
    with session.client() as client:
        if session.as_json:
            events = fetch_pages(lambda size, cursor: client.events_page(job_id, size, cursor), sys.maxsize)
            session.show(events, Text)
        else:
            typer.echo(client.logs(job_id), nl=False)


@app.command()
def metrics(ctx: typer.Context, job_id: JobId) -> None:
    """Show mean scores by round, split, scorer and model."""
    session: Session = ctx.obj
    with session.client() as client:
        metrics = client.metrics(job_id)

    headings = ("round", "split", "scorer", "model", "images>", "mean>", "std>")
    rows = ((m.round, m.split, m.scorer, m.model, m.count, figure(m.mean), figure(m.std)) for m in metrics.data)
    session.show(metrics, lambda: listing(headings, rows))


@app.command()
def report(
    ctx: typer.Context,
    job_id: JobId,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write")] = Path("report.html"),
    pairs: Annotated[int, typer.Option(min=0, max=50, help="Number of pairs to show")] = 12,
    prompts: Annotated[int, typer.Option(min=0, max=50, help="Number of prompts to show before and after")] = 8,
) -> None:
    """Write the report of a job to one HTML file: its curves, changes of scores, images and pairs.

    Example: dfusion jobs report job_… --output report.html
    """
    session: Session = ctx.obj
    with session.client() as client:
        text = client.report(job_id, pairs=pairs, prompts=prompts)
    output.write_text(text, encoding="utf-8")
    session.show({"file": str(output)}, lambda: Text(str(output)))


@app.command("export-tensorboard")
def export_events(
    ctx: typer.Context,
    job_id: JobId,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for tensorboard --logdir")] = Path("tensorboard"),
) -> None:
    """Write a job's scores, updates and pairs as TensorBoard event files to DIR/JOB.

    Example: dfusion jobs export-tensorboard job_… --out runs
    """
    from api.experiments.tensorboard import export_tensorboard

    session: Session = ctx.obj
    with session.client() as client:
        folder = export_tensorboard(client, job_id, out)
    session.show({"folder": str(folder)}, lambda: Text(f"{folder}: to view it, run tensorboard --logdir {out}"))


def follow_to_end(session: Session, client: Client, job_id: str) -> None:
    """Follow a job until it ends, then show it.

    Raises:
        typer.Exit: With code 3 if the job did not succeed, 130 on Ctrl-C.
    """
    console = session.err if session.as_json else session.out
    if not session.as_json:
        console.print(f"to follow it later: dfusion jobs follow {job_id}", style="dim", highlight=False)

    try:
        job = follow_job(client, job_id, console)
    except KeyboardInterrupt:
        session.err.print(
            f"{job_id} continues; dfusion jobs follow {job_id} shows it, dfusion jobs cancel {job_id} cancels it",
            highlight=False,
        )
        raise typer.Exit(INTERRUPTED) from None

    session.show(job, lambda: Group(Text(), job_sheet(job)))
    session.require_success(job)


def _show_job(session: Session, job: JobDetail) -> None:
    session.show(job, lambda: job_sheet(job))


def job_sheet(job: JobDetail) -> RenderableType:
    """Render a job as a table of names and values."""
    outputs = ", ".join(f"{count} {kind}" for kind, count in job.outputs.items() if count)
    fields = {
        "job": job.id,
        "kind": job.kind,
        "state": styled_state(job.state),
        "progress": f"{job.progress.percent:.0f} %  {'  '.join(position(job))}".rstrip(),
        "label": job.label,
        "priority": job.priority or None,
        "model": job.model,
        "prompts": job.prompt_set,
        "origin": job.origin,
        "outputs": outputs or None,
        "storage": size(job.storage_bytes),
        "last model": job.last_model,
        "best round": None if job.best is None else _best_round(job.best),
        "stopped": None if job.stopped is None else _stopped(job.stopped),
        "error": None if job.error is None else f"{job.error.code}: {job.error.message}",
        "created": local_time(job.created_at),
        "ended": None if job.finished_at is None else local_time(job.finished_at),
    }

    parts: list[RenderableType] = [sheet(fields)]
    if job.result is not None and job.kind is JobKind.EVALUATION:
        parts += [Text(), _evaluation(job.result)]
    return Group(*parts)


def _best_round(best: BestRoundOut) -> str:
    prompts = "held-out" if best.split == Split.HELD_OUT else "training"
    return f"{best.round}: {best.model}, {best.scorer} {figure(best.mean)} on {prompts} prompts"


def _stopped(stopped: StoppedOut) -> str:
    return f"after round {stopped.round} of {stopped.rounds}: {stopped.reason}"


def _evaluation(result: dict[str, Any]) -> RenderableType:
    """Render the mean and interval of each model and scorer; the first model is the one compared with."""
    return listing(("model", "split", "scorer", "mean>", "interval"), _evaluation_rows(result))


def _evaluation_rows(result: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for split, results in result["splits"].items():
        for scores in results["models"]:
            interval = " to ".join(map(figure, scores["interval"] or [None]))
            yield scores["model"], split, scores["scorer"], figure(scores["mean"]), interval
