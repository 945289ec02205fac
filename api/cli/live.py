"""A job as it goes on: a screen that is drawn anew on a terminal, a line an event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from api.cli.screens import clock, figure, state
from api.client import Client
from api.wire.jobs import JobDetail, MetricOut
from service.states import JobKind, JobState, StageState

SPLITS = {"train": "training", "held_out": "held out", "rollout": "samples"}
"""Which images a score is over, in few letters."""
_TO_BE_TRIED = frozenset({StageState.QUEUED, StageState.RUNNING})
_LOOK_SECONDS = 1.0
_TELL_SECONDS = 5.0


@dataclass(frozen=True)
class Change:
    """A scorer's mean over a split in the latest round, and since the first; None where there is only one."""

    split: str
    scorer: str
    latest: float
    change: float | None


def changes(metrics: Sequence[MetricOut]) -> list[Change]:
    """How scores went, by split and scorer."""
    by_round: dict[tuple[str, str], dict[int, float]] = {}
    for metric in metrics:
        by_round.setdefault((metric.split, metric.scorer), {})[metric.round] = metric.mean
    return [
        Change(split, scorer, means[max(means)], means[max(means)] - means[min(means)] if len(means) > 1 else None)
        for (split, scorer), means in sorted(by_round.items(), key=lambda item: (list(SPLITS).index(item[0][0]), item))
        if split in SPLITS
    ]


def follow_job(client: Client, job_id: str, console: Console) -> JobDetail:
    """Show a job until it has ended; the job as it is then."""
    return _on_terminal(client, job_id, console) if console.is_terminal else _as_lines(client, job_id, console)


def _on_terminal(client: Client, job_id: str, console: Console) -> JobDetail:
    job, metrics, seen = client.job(job_id), list[MetricOut](), -1
    with Live(screen(job, metrics), console=console, refresh_per_second=4) as live:
        while True:
            done = sum(stage.state == StageState.SUCCEEDED for stage in job.stages)
            if done != seen and job.kind is JobKind.ROUND:
                seen, metrics = done, client.metrics(job_id).data
            live.update(screen(job, metrics))
            if job.state.is_final:
                return job
            job = client.job(job_id, wait=_LOOK_SECONDS)


def _as_lines(client: Client, job_id: str, console: Console) -> JobDetail:
    told_at, progress = 0.0, client.job(job_id).progress
    for event in client.follow(job_id):
        if time.monotonic() - told_at > _TELL_SECONDS:
            told_at, progress = time.monotonic(), client.job(job_id).progress
        at = event.at.astimezone().strftime("%H:%M:%S")
        left = "" if progress.eta_seconds is None else f", {clock(progress.eta_seconds)} left"
        line = f"{at} {progress.percent:3.0f} %{left}  {event.kind}: {event.message}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return client.job(job_id)


def screen(job: JobDetail, metrics: Sequence[MetricOut]) -> RenderableType:
    """The job on a few short lines."""
    progress = job.progress
    where = []
    if progress.round is not None and job.rounds > 1:
        where.append(f"round {progress.round} of {job.rounds}")
    if progress.stage is not None:
        where.append(_stage(job))
    if not job.state.is_final:
        where.append(f"{clock(progress.eta_seconds)} left")
    parts: list[RenderableType] = [
        Text.from_markup(f"[bold]{job.kind}[/] {job.id} {state(job.state)}", overflow="fold"),
        _bar(progress.percent),
        Text("  ".join(where)),
    ]
    if job.label:
        parts.insert(1, Text(job.label, style="italic"))
    if metrics:
        parts.append(_scores(changes(metrics)))
    if job.state is JobState.WAITING:
        parts.append(Text(f"judge its pairs: dfusion pairs list --job {job.id} --unjudged", style="yellow"))
    if job.error is not None:
        parts.append(Text(f"{job.error.code}: {job.error.message}", style="red"))
    for stage in job.stages:
        if stage.error is not None and stage.state in _TO_BE_TRIED:
            parts.append(Text(f"{stage.kind} is tried again: {stage.error.message}", style="yellow"))
    return Group(*parts)


def _stage(job: JobDetail) -> str:
    """The stage that runs, which of its shards, and how far that is: "sample 3 of 10, 4/16"."""
    progress = job.progress
    name = progress.stage or ""
    shards = [stage for stage in job.stages if (stage.kind, stage.round) == (progress.stage, progress.round)]
    running = [stage.shard + 1 for stage in shards if stage.state == StageState.RUNNING]
    if len(shards) > 1 and running:
        name += f" {running[0]} of {len(shards)},"
    return f"{name} {progress.done}/{progress.total}" if progress.total else name.rstrip(",")


def _bar(percent: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(ProgressBar(total=100, completed=percent), f"{percent:.0f} %")
    return grid


def _scores(rows: Sequence[Change]) -> Table:
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
