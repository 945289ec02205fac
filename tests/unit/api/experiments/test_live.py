"""Progress output of an experiment."""

from io import StringIO

import pytest
from rich.console import Console

from api.cli.experiment_live import progress, screen
from api.client import Client
from api.experiments.runner import Failure, Running, State
from api.wire.jobs import JobDetail
from tests.unit.api.conftest import Live
from tests.unit.api.experiments.examples import cells_by_name, experiment


@pytest.fixture
def job(live: Live) -> JobDetail:
    client: Client
    with live.client() as client:
        done = client.job(live.done_job)
    progress = done.progress.model_copy(update={"stage": "train", "round": 2})
    return done.model_copy(update={"rounds": 3, "progress": progress})


def state(job: JobDetail, *, is_later: bool = False) -> State:
    cells = cells_by_name(experiment())
    base, naive, fused, *waiting = cells.values()
    return State(
        cells=5,
        done=[base, naive] if is_later else [base],
        waiting=waiting,
        running=[Running(fused, job, 41.6)] if is_later else [Running(naive, job, 50)],
        failures=[Failure(waiting[0], "job_9", "the round failed: out_of_memory: [red]no room")] if is_later else [],
        percent=63.2,
        seconds_left=3723,
    )


def rendered(job: JobDetail, width: int) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(screen(state(job, is_later=True)))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.slow
def test_screen_shows_summary_running_and_failed_cells(job: JobDetail) -> None:
    lines = rendered(job, 120)
    assert lines[0] == "2 of 5 cells done, 1 running, 2 left, 1 failed, 63 %, 1:02:03 left"
    assert lines[1].startswith("shapes/fused/seed 1")
    assert lines[1].endswith(f"42 %  round {job.id}: round 2 of 3, train")
    assert lines[2] == "shapes/naive/seed 2 failed: the round failed: out_of_memory: [red]no room (job_9)"
    assert max(map(len, rendered(job, 60))) <= 60


@pytest.mark.slow
def test_lines_report_only_changes(job: JobDetail) -> None:
    console = Console(width=200, file=StringIO(), force_terminal=False)
    with progress(console) as show:
        for _ in range(3):
            show(state(job))
        show(state(job, is_later=True))
    assert isinstance(console.file, StringIO)
    messages = [line.partition(" left  ")[2] for line in console.file.getvalue().splitlines()]
    assert messages == [
        f"shapes/naive/seed 1: round {job.id}",
        "shapes/naive/seed 1: done",
        "shapes/naive/seed 2 failed: the round failed: out_of_memory: [red]no room (job_9)",
        f"shapes/fused/seed 1: round {job.id}",
    ]
