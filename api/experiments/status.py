"""The status of an experiment's cells. Starts nothing."""

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
    """A cell with its record or its latest job.

    state   "recorded", the state of the job, or "not started"
    """

    cell: Cell
    state: str
    record: Path | None = None
    job: JobOut | None = None


def status(
    experiment: Experiment, client: Client, out: Path, *, selection: Selection | None = None
) -> tuple[CellStatus, ...]:
    """Find the cells' records and latest jobs. Queries the service only for cells without a record.

    Jobs are identified by their labels, which contain a digest of the settings. Jobs that were submitted without the
    runner are ignored.

    Args:
        experiment: The matrix.
        client: A client of the service.
        out: Folder of all records.
        selection: The cells; all if not given.

    Returns:
        The status of each cell.

    Raises:
        ExperimentError: The selection names an unknown list, arm or seed, or a record is invalid.
        ApiError: The service cannot be read.
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
    """Find the newest job of each label."""
    kinds: tuple[tuple[JobKind, Literal["round_label", "evaluation_label"]], ...] = (
        (JobKind.ROUND, "round_label"),
        (JobKind.EVALUATION, "evaluation_label"),
    )

    jobs: dict[str, JobOut] = {}
    for kind, name in kinds:
        labels = {getattr(cell, name) for cell in cells}
        for job in client.jobs(kind=kind) if labels else ():
            if job.label in labels:
                jobs[job.label or ""] = job
                labels.remove(job.label)
            if not labels:
                break
    return jobs
