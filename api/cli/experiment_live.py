"""Progress of an experiment: a live screen on a terminal, otherwise one line per change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from api.cli.screens import clock

if TYPE_CHECKING:
    from api.experiments.runner import Failure, Running, Show, State

_LINE_SECONDS = 60.0
"""Longest time between two lines, even if nothing has changed."""


@contextmanager
def progress(console: Console) -> Iterator[Show]:
    """Yield the callback that shows the runner's state; pass it to `run` as `show`."""
    if not console.is_terminal:
        yield _LineReporter(console).show
        return

    with Live(console=console, refresh_per_second=4) as live:
        yield lambda state: live.update(screen(state))


def screen(state: State) -> RenderableType:
    """Render the state: a summary, then the running cells, then the failed cells."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, width=20)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")

    for running in state.running:
        bar = ProgressBar(total=100, completed=running.percent, width=20)
        table.add_row(escape(running.cell.name), bar, f"{running.percent:.0f} %", escape(describe_job(running)))

    failures = [Text(failure_line(failure), style="red") for failure in state.failures]
    return Group(Text(summary(state), style="bold"), table, *failures)


def summary(state: State) -> str:
    """Summarize all cells in one line."""
    parts = [f"{len(state.done)} of {state.cells} cells done", f"{len(state.running)} running"]
    parts.append(f"{len(state.waiting)} left")
    if state.failures:
        parts.append(f"{len(state.failures)} failed")
    if state.running or state.waiting:
        parts += [f"{state.percent:.0f} %", f"{clock(state.seconds_left)} left"]
    return ", ".join(parts)


def describe_job(running: Running) -> str:
    """Describe what a running cell's job does: its kind, id, round and stage."""
    job = running.job
    position = f"round {job.progress.round} of {job.rounds}, " if job.progress.round and job.rounds > 1 else ""
    return f"{job.kind} {job.id}: {position}{job.progress.stage or job.state}"


def failure_line(failure: Failure) -> str:
    """Describe a failed cell: its name, error and job."""
    return " ".join(filter(None, (f"{failure.cell.name} failed:", failure.message, failure.job and f"({failure.job})")))


class _LineReporter:
    """Prints a line when a cell or job starts or ends, and the progress every `_LINE_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reported: dict[str, str] = {}
        self._printed_at = time.monotonic()
        self._is_first = True

    def show(self, state: State) -> None:
        changes = {cell.name: "done" for cell in state.done}
        changes |= {failure.cell.name: failure_line(failure) for failure in state.failures}
        changes |= {running.cell.name: f"{running.job.kind} {running.job.id}" for running in state.running}

        if self._is_first:  # cells that were done before the run are not reported
            self._reported |= {cell.name: "done" for cell in state.done}
            self._is_first = False

        for name, change in changes.items():
            if self._reported.get(name) != change:
                self._print(state, change if change.startswith(name) else f"{name}: {change}")
        self._reported |= changes

        if time.monotonic() - self._printed_at > _LINE_SECONDS:
            self._print(state, "; ".join(f"{running.cell.name} {running.percent:.0f} %" for running in state.running))

    def _print(self, state: State, text: str) -> None:
        self._printed_at = time.monotonic()
        time_of_day = datetime.now().strftime("%H:%M:%S")
        line = f"{time_of_day} {summary(state)}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
