"""How far a run of an experiment is: a live screen on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from api.cli.screens import clock
from api.experiments.runner import Failure, Running, Show, State

_LINE_SECONDS = 60.0
"""A line at least so often, also where nothing has changed."""


@contextmanager
def progress(console: Console) -> Iterator[Show]:
    """What `run` shows its state with, for the length of the block."""
    if not console.is_terminal:
        yield _Lines(console).show
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda state: live.update(screen(state))


def screen(state: State) -> RenderableType:
    """The state on a few lines: the whole, the running cells, the failed ones."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, width=20)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for one in state.running:
        bar = ProgressBar(total=100, completed=one.percent, width=20)
        table.add_row(escape(one.cell.name), bar, f"{one.percent:.0f} %", escape(what(one)))
    failures = [Text(failure_line(failure), style="red") for failure in state.failures]
    return Group(Text(summary(state), style="bold"), table, *failures)


def summary(state: State) -> str:
    """The whole in one line."""
    parts = [f"{len(state.done)} of {state.cells} cells done", f"{len(state.running)} running"]
    parts.append(f"{len(state.waiting)} left")
    if state.failures:
        parts.append(f"{len(state.failures)} failed")
    if state.running or state.waiting:
        parts += [f"{state.percent:.0f} %", f"{clock(state.seconds_left)} left"]
    return ", ".join(parts)


def what(running: Running) -> str:
    """What a running cell's job does now."""
    job = running.job
    where = f"round {job.progress.round} of {job.rounds}, " if job.progress.round and job.rounds > 1 else ""
    return f"{job.kind} {job.id}: {where}{job.progress.stage or job.state}"


def failure_line(failure: Failure) -> str:
    """A failed cell, its job and its error."""
    return " ".join(filter(None, (f"{failure.cell.name} failed:", failure.message, failure.job and f"({failure.job})")))


class _Lines:
    """A line for each cell or job that begins or ends, and now and then for the whole."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._known: dict[str, str] = {}
        self._said_at = time.monotonic()
        self._is_first = True

    def show(self, state: State) -> None:
        changes = {cell.name: "done" for cell in state.done}
        changes |= {failure.cell.name: failure_line(failure) for failure in state.failures}
        changes |= {one.cell.name: f"{one.job.kind} {one.job.id}" for one in state.running}
        if self._is_first:  # what was done before the run is no news
            self._known |= {cell.name: "done" for cell in state.done}
            self._is_first = False

        for name, change in changes.items():
            if self._known.get(name) != change:
                self._say(state, change if change.startswith(name) else f"{name}: {change}")
        self._known |= changes
        if time.monotonic() - self._said_at > _LINE_SECONDS:
            self._say(state, "; ".join(f"{one.cell.name} {one.percent:.0f} %" for one in state.running))

    def _say(self, state: State, text: str) -> None:
        self._said_at = time.monotonic()
        at = datetime.now().strftime("%H:%M:%S")
        line = f"{at} {summary(state)}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
