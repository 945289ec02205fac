"""Where the cells of an experiment are, without starting anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from api.client import Client
from api.experiments.cells import Cell, Selection, cells_of
from api.experiments.format import Experiment
from api.experiments.records import folder_of, record_of
from api.wire.jobs import JobOut
from service.states import JobKind


@dataclass(frozen=True)
class CellStatus:
    """A cell: its record, or its latest job.

    state   recorded; a job's state; or "not started"
    """

    cell: Cell
    state: str
    record: Path | None = None
    job: JobOut | None = None


def status(
    experiment: Experiment, client: Client, out: Path, *, selection: Selection | None = None
) -> tuple[CellStatus, ...]:
    """The cells' records and latest jobs. The service is asked only for cells without a record.

    Jobs are known by their labels, which name the cell's settings; a job that was posted without the runner is not
    looked for. Raises ExperimentError, ApiError.
    """
    folder = folder_of(out, experiment.name)
    cells = cells_of(experiment, selection)
    recorded = {cell.name for cell in cells if record_of(folder, cell) is not None}
    jobs = _latest_jobs(client, [cell for cell in cells if cell.name not in recorded])
    return tuple(
        CellStatus(cell, "recorded", folder / cell.file_name)
        if cell.name in recorded
        else _status_of(cell, jobs.get(cell.evaluation_label) or jobs.get(cell.round_label))
        for cell in cells
    )


def _status_of(cell: Cell, job: JobOut | None) -> CellStatus:
    return CellStatus(cell, "not started" if job is None else str(job.state), job=job)


def _latest_jobs(client: Client, cells: list[Cell]) -> dict[str, JobOut]:
    """The newest job of each label."""
    kinds: tuple[tuple[JobKind, Literal["round_label", "evaluation_label"]], ...] = (
        (JobKind.ROUND, "round_label"),
        (JobKind.EVALUATION, "evaluation_label"),
    )
    jobs: dict[str, JobOut] = {}
    for kind, name in kinds:
        wanted = {getattr(cell, name) for cell in cells}
        for job in client.jobs(kind=kind) if wanted else ():
            if job.label in wanted:
                jobs[job.label or ""] = job
                wanted.remove(job.label)
            if not wanted:
                break
    return jobs
