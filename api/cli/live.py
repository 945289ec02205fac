"""Progress of a job: a live screen on a terminal, otherwise one line per event."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from api.cli.screens import clock, figure, state
from service.states import JobKind, JobState, StageState

if TYPE_CHECKING:
    from api.client import Client
    from api.wire.jobs import JobDetail, MetricOut, ProgressOut, StageOut

SPLITS = {"train": "training", "held_out": "held out", "rollout": "samples"}
"""Short labels of the splits: the images that a score is averaged over."""
_RETRYING = 5
"""Stages to be retried that the live screen shows."""
_POLL_SECONDS = 1.0
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class ScoreChange:
    """A scorer's mean over a split in the latest round.

    change   difference from the first round; None if there is only one round
    """

    split: str
    scorer: str
    latest: float
    change: float | None


def changes(metrics: Sequence[MetricOut]) -> list[ScoreChange]:
    """Compute the latest mean and its change since the first round, by split and scorer."""
    by_round: dict[tuple[str, str], dict[int, float]] = {}
    for metric in metrics:
        if metric.split in SPLITS:
            by_round.setdefault((metric.split, metric.scorer), {})[metric.round] = metric.mean

    rows = []
    for (split, scorer), means in sorted(by_round.items(), key=lambda item: (list(SPLITS).index(item[0][0]), item)):
        latest = means[max(means)]
        change = latest - means[min(means)] if len(means) > 1 else None
        rows.append(ScoreChange(split, scorer, latest, change))
    return rows


def follow_job(client: Client, job_id: str, console: Console) -> JobDetail:
    """Show a job's progress until it ends. Returns the ended job."""
    if console.is_terminal:
        return _show_live(client, job_id, console)
    return _print_events(client, job_id, console)


def _show_live(client: Client, job_id: str, console: Console) -> JobDetail:
    job = client.job(job_id)
    metrics: list[MetricOut] = []
    measured_at: object = None

    with Live(screen(job, metrics), console=console, refresh_per_second=4) as live:
        while True:
            # metrics can only change when another stage runs
            stage = (job.state, job.progress.stage, job.progress.round)
            if stage != measured_at and job.kind is JobKind.ROUND:
                measured_at = stage
                metrics = client.metrics(job_id).data

            retrying = client.stages_page(job_id, _RETRYING, state=StageState.QUEUED, with_error=True).data
            live.update(screen(job, metrics, retrying))
            if job.state.is_final:
                return job
            job = client.job(job_id, wait=_POLL_SECONDS)


def _print_events(client: Client, job_id: str, console: Console) -> JobDetail:
    progress = client.job(job_id).progress
    progress_read_at = 0.0

    for event in client.follow(job_id):
        if time.monotonic() - progress_read_at > _PROGRESS_SECONDS:
            progress_read_at = time.monotonic()
            progress = client.job(job_id).progress

        event_time = event.created_at.astimezone().strftime("%H:%M:%S")
        left = "" if progress.eta_seconds is None else f", {clock(progress.eta_seconds)} left"
        line = f"{event_time} {progress.percent:3.0f} %{left}  {event.kind}: {event.message}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return client.job(job_id)


def screen(job: JobDetail, metrics: Sequence[MetricOut], retrying: Sequence[StageOut] = ()) -> RenderableType:
    """Render a job: state, progress bar, position, scores and messages. `retrying` are stages that will be retried."""
    parts: list[RenderableType] = [
        Text.from_markup(f"[bold]{job.kind}[/] {job.id} {state(job.state)}", overflow="fold"),
        _bar(job.progress.percent),
        Text("  ".join(position(job))),
    ]
    if job.label:
        parts.insert(1, Text(job.label, style="italic"))

    if metrics:
        parts.append(_scores(changes(metrics)))
    if job.state is JobState.WAITING:
        parts.append(Text(_waits_for(job), style="yellow"))
    if job.error is not None:
        parts.append(Text(f"{job.error.code}: {job.error.message}", style="red"))
    for stage in retrying:
        message = stage.error.message if stage.error else ""
        parts.append(Text(f"retrying {stage.kind}: {message}", style="yellow"))

    return Group(*parts)


def _waits_for(job: JobDetail) -> str:
    review = job.review
    judged = "" if review is None else f" ({review.judged} of {review.pairs} pairs judged)"
    return f"the job waits for verdicts{judged}: dfusion pairs list --job {job.id} --in-review --unjudged"


def position(job: JobDetail) -> list[str]:
    """The job's round, stage and remaining time, as far as they are known."""
    progress = job.progress
    parts = []
    if progress.round is not None and job.rounds > 1:
        parts.append(f"round {progress.round} of {job.rounds}")
    if progress.stage is not None:
        parts.append(_stage(progress))
    if not job.state.is_final:
        parts.append(f"{clock(progress.eta_seconds)} left")
    return parts


def _stage(progress: ProgressOut) -> str:
    """The running stage, its shard and its progress: "sample 3 of 10, 4/16"."""
    name = progress.stage or ""
    if progress.shards > 1 and progress.shard is not None:
        name += f" {progress.shard + 1} of {progress.shards},"
    return f"{name} {progress.done}/{progress.total}" if progress.total else name.rstrip(",")


def _bar(percent: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(ProgressBar(total=100, completed=percent), f"{percent:.0f} %")
    return grid


def _scores(rows: Sequence[ScoreChange]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("scores", "", "latest", "change"):
        table.add_column(heading, justify="left" if heading in ("scores", "") else "right", overflow="fold")

    for row in rows:
        table.add_row(SPLITS[row.split], escape(row.scorer), figure(row.latest), _signed(row.change))
    return table


def _signed(change: float | None) -> Text:
    if change is None:
        return Text()
    return Text(f"{change:+.4f}", style="green" if change > 0 else "red" if change < 0 else "dim")
