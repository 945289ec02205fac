"""Runs the cells of an experiment as jobs of a service and writes a record of each finished cell.

A cell is a round job followed by an evaluation job. Both are submitted with an Idempotency-Key derived from all their
settings, so that a run that continues, on any machine, gets the existing jobs. All state is in the service and in the
records; the runner stores none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.client import Client, InvalidError, TooManyRequestsError, UnavailableError, UnreachableError
from api.experiments.cells import Cell, Selection, cells_of
from api.experiments.collect import SILENT, collect, has_failed, models_after
from api.experiments.errors import ExperimentError
from api.experiments.format import Experiment, PromptListSpec, digest, evaluation_body, prompt_set_name
from api.experiments.records import folder_of, record_of, write_record
from api.wire.common import FieldError
from api.wire.estimates import EstimateOut
from api.wire.jobs import JobDetail
from service.states import JobKind

_PASSING = (UnreachableError, UnavailableError, TooManyRequestsError)
_BACKWARD_WORK = 3
"""Work of a training row: a forward and a backward pass, in units of forward passes."""
_GPU_QUEUE = "gpu"


@dataclass(frozen=True)
class Failure:
    """A cell that failed, with its job and the reason."""

    cell: Cell
    job: str | None
    message: str


@dataclass(frozen=True)
class Running:
    """A cell with an unfinished job. `percent` is the cell's progress."""

    cell: Cell
    job: JobDetail
    percent: float


@dataclass(frozen=True)
class State:
    """Progress of a run. `percent` is the share of the work; `seconds_left` is None until it can be estimated."""

    cells: int
    done: Sequence[Cell]
    waiting: Sequence[Cell]
    running: Sequence[Running]
    failures: Sequence[Failure]
    percent: float
    seconds_left: float | None


@dataclass(frozen=True)
class RunResult:
    """The result of a run: cells with a record, the number of records from earlier runs, and failed cells."""

    done: tuple[Cell, ...]
    recorded_before: int
    failures: tuple[Failure, ...]


@dataclass
class _Active:
    """A cell in progress. `round_job` is None until the round job has ended, and for the model before training."""

    cell: Cell
    job: JobDetail
    round_job: JobDetail | None = None

    @property
    def is_evaluation(self) -> bool:
        """Whether `job` is the evaluation job."""
        return self.cell.settings.round is None or self.round_job is not None


@dataclass(frozen=True)
class _Weight:
    """Work of a cell's jobs in U-Net rows, for estimating progress."""

    round: float
    evaluation: float

    @property
    def total(self) -> float:
        return self.round + self.evaluation


Show = Callable[[State], None]


def run(
    experiment: Experiment,
    client: Client,
    out: Path,
    *,
    selection: Selection | None = None,
    parallel: int | None = None,
    show: Show = lambda _state: None,
    poll_seconds: float = 1.0,
    patience_seconds: float = 600.0,
) -> RunResult:
    """Run the selected cells that have no record yet, and return when all have ended.

    Args:
        experiment: The matrix.
        client: A client of the service.
        out: Folder of all records; those of the experiment are written to `out/<name of the experiment>/`.
        selection: The cells to run; all if not given.
        parallel: Number of cells that run at once; the number of workers if not given.
        show: Called with the state after each poll of the jobs.
        poll_seconds: Time between two polls.
        patience_seconds: Time to retry while the service is unavailable.

    Returns:
        The cells with a record and the failed cells. A failed job does not stop the others.

    Raises:
        ExperimentError: The service rejects the settings of a cell; no job was started.
        RecordError: The file of a record is invalid.
        ApiError: The service cannot be used, or was unavailable for longer than `patience_seconds`.
    """
    runner = _Runner(experiment, client, folder_of(out, experiment.name), parallel, patience_seconds)
    return runner.run(selection or Selection(), show, poll_seconds)


@dataclass
class _Runner:
    experiment: Experiment
    client: Client
    folder: Path
    parallel: int | None
    patience_seconds: float
    cells: tuple[Cell, ...] = ()
    done: list[Cell] = field(default_factory=list)
    waiting: list[Cell] = field(default_factory=list)
    active: list[_Active] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    weights: dict[str, _Weight] = field(default_factory=dict)
    _started_at: float = 0.0
    _work_at_start: float | None = None

    def run(self, selection: Selection, show: Show, poll_seconds: float) -> RunResult:
        self.cells = cells_of(self.experiment, selection)
        for cell in self.cells:
            has_record = record_of(self.folder, cell) is not None
            (self.done if has_record else self.waiting).append(cell)
        recorded = len(self.done)

        if self.waiting:
            self._retry(self._prepare)

        self._started_at = time.monotonic()
        while self.waiting or self.active:
            self._retry(self._poll)
            show(self._state())
            if self.waiting or self.active:
                time.sleep(poll_seconds)
        return RunResult(tuple(self.done), recorded, tuple(self.failures))

    def _retry(self, action: Callable[[], None]) -> None:
        """Repeat an idempotent action while the service is unavailable."""
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                return action()
            except _PASSING:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    # before the first job

    def _prepare(self) -> None:
        """Create the prompt sets of inline prompts and let the service check every cell. Raises ExperimentError."""
        lists = {cell.list_name for cell in self.waiting}
        for name, prompts in self.experiment.prompt_lists.items():
            if name in lists:
                self._add_prompts(prompts)
        for cell in self.waiting:
            self.weights[cell.settings.key] = self._weigh(cell)

    def _add_prompts(self, spec: PromptListSpec) -> None:
        for prompts in (spec.train, spec.held_out):
            if isinstance(prompts, tuple):
                name = prompt_set_name(prompts)
                self.client.add_prompt_set(name, prompts, description="Prompts of an experiment's file")

    def _weigh(self, cell: Cell) -> _Weight:
        """Return the cell's work as estimated by the service, which also checks the settings."""
        evaluation = evaluation_body(cell.settings, [cell.settings.model])
        rows_per_model = self._estimate(cell, JobKind.EVALUATION, evaluation).unet_evaluations.evaluation

        round_rows = 0.0
        if cell.round_body is not None:
            counts = self._estimate(cell, JobKind.ROUND, cell.round_body).unet_evaluations
            round_rows = counts.total_at_most + (_BACKWARD_WORK - 1) * counts.training_at_most
        return _Weight(round_rows, rows_per_model * len(cell.settings.rounds))

    def _estimate(self, cell: Cell, kind: JobKind, body: Mapping[str, Any]) -> EstimateOut:
        try:
            return self.client.estimate(kind, body)
        except InvalidError as error:
            fields = [FieldError(pointer=f"{cell.name}: {e.pointer}", message=e.message) for e in error.errors]
            raise ExperimentError(f"the service rejects the {kind} of {cell.name}: {error.detail}", fields) from error

    # while jobs run

    def _poll(self) -> None:
        """Read every job once and start cells up to the limit."""
        for active in list(self.active):
            active.job = self.client.job(active.job.id)
            if active.job.state.is_final:
                self._finish_job(active)

        while self.waiting and len(self.active) < self._max_active():
            try:
                self._start(self.waiting[0])
            except TooManyRequestsError:  # jobs of other clients fill the queue
                return

    def _max_active(self) -> int:
        """Return the number of cells that may run at once."""
        if self.parallel is not None:
            return self.parallel
        workers = self.client.workers().data
        return max(1, sum(worker.state != SILENT and _GPU_QUEUE in worker.queues for worker in workers))

    def _start(self, cell: Cell) -> None:
        """Submit the cell's first job, or get the job that an earlier run has submitted."""
        try:
            if cell.round_body is None:
                job = self._evaluate(cell, None)
            else:
                job = self._job(JobKind.ROUND, cell.round_body | {"label": cell.round_label})
        except InvalidError as error:
            self.failures.append(Failure(cell, None, error.detail))
        else:
            self.active.append(_Active(cell, job))
        self.waiting.remove(cell)

    def _evaluate(self, cell: Cell, round_job: JobDetail | None) -> JobDetail:
        models = dict.fromkeys(models_after(self.client, cell, round_job).values())
        body = evaluation_body(cell.settings, models)
        return self._job(JobKind.EVALUATION, body | {"label": cell.evaluation_label})

    def _job(self, kind: JobKind, body: Mapping[str, Any]) -> JobDetail:
        """Submit a job, or get the existing one with equal settings. Retries a job that has failed."""
        decisive = {name: value for name, value in body.items() if name != "priority"}
        key = f"experiment-{kind}-{digest(decisive)}"
        job = self.client.submit(kind, body, idempotency_key=key)
        while has_failed(job):
            job = self.client.retry(job.id, idempotency_key=f"{key}-after-{job.id}")
        return job

    def _finish_job(self, active: _Active) -> None:
        """Handle a job that has ended: start the evaluation, write the record, or add a failure."""
        cell = active.cell
        job = active.job

        try:
            if has_failed(job):
                reason = f"{job.error.code}: {job.error.message}" if job.error else "it was cancelled"
                self.failures.append(Failure(cell, job.id, f"the {job.kind} {job.state}: {reason}"))
            elif not active.is_evaluation:
                active.job = self._evaluate(cell, job)
                active.round_job = job
                return
            else:
                record = collect(self.client, self.experiment.name, cell, active.round_job, job)
                write_record(self.folder, cell, record)
                self.done.append(cell)
        except InvalidError as error:
            self.failures.append(Failure(cell, job.id, error.detail))

        self.active.remove(active)

    # what is shown

    def _state(self) -> State:
        running = tuple(Running(active.cell, active.job, self._percent(active)) for active in self.active)
        total = sum(weight.total for weight in self.weights.values())
        done = self._work_done()

        return State(
            cells=len(self.cells),
            done=tuple(self.done),
            waiting=tuple(self.waiting),
            running=running,
            failures=tuple(self.failures),
            percent=100 * done / total if total else 100.0,
            seconds_left=self._seconds_left(done, total),
        )

    def _percent(self, active: _Active) -> float:
        weight = self.weights[active.cell.settings.key]
        job_share = active.job.progress.percent / 100
        done = weight.round + weight.evaluation * job_share if active.is_evaluation else weight.round * job_share
        return 100 * done / weight.total if weight.total else 0.0

    def _work_done(self) -> float:
        """Return the work done by this run, in U-Net rows; excludes cells that had a record before."""
        ended = [*self.done, *(failure.cell for failure in self.failures)]
        keys = {cell.settings.key for cell in ended}
        done = sum(weight.total for key, weight in self.weights.items() if key in keys)

        for active in self.active:
            done += self.weights[active.cell.settings.key].total * self._percent(active) / 100
        return done

    def _seconds_left(self, done: float, total: float) -> float | None:
        """Estimate the remaining time at this run's speed; None until it has made progress."""
        if self._work_at_start is None:
            self._work_at_start = done
        gained = done - self._work_at_start
        if gained <= 0:
            return None
        return (total - done) * (time.monotonic() - self._started_at) / gained
