"""Run the cells of an experiment as jobs of a service, and write a record of each that has ended.

A cell is a round job and then an evaluation job. Both are posted under an Idempotency-Key made from all their settings:
a run that goes on after it was stopped, from any machine, gets the jobs that are there already. What is known is in the
service and in the records; the runner keeps nothing of its own.
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
from api.experiments.format import Experiment, PromptListSpec, digest, evaluation_body, set_name
from api.experiments.records import folder_of, record_of, write_record
from api.wire.common import FieldError
from api.wire.estimates import EstimateOut
from api.wire.jobs import JobDetail
from service.states import JobKind

_PASSING = (UnreachableError, UnavailableError, TooManyRequestsError)
_BACKWARD_WORK = 3
"""A training row takes a forward and a backward pass."""
_GPU_QUEUE = "gpu"


@dataclass(frozen=True)
class Failure:
    """A cell that has no record, and why."""

    cell: Cell
    job: str | None
    message: str


@dataclass(frozen=True)
class Running:
    """A cell whose job is not finished; `percent` is that of the cell."""

    cell: Cell
    job: JobDetail
    percent: float


@dataclass(frozen=True)
class State:
    """How far a run is. `percent` counts work, `seconds_left` is None until enough is known."""

    cells: int
    done: Sequence[Cell]
    waiting: Sequence[Cell]
    running: Sequence[Running]
    failures: Sequence[Failure]
    percent: float
    seconds_left: float | None


@dataclass(frozen=True)
class RunResult:
    """What a run came to: cells with a record, how many of them had one before, and cells without."""

    done: tuple[Cell, ...]
    recorded_before: int
    failures: tuple[Failure, ...]


@dataclass
class _Active:
    """A cell that is under way. `round_job` is None before training, and until the round job has ended."""

    cell: Cell
    job: JobDetail
    round_job: JobDetail | None = None

    @property
    def is_evaluated(self) -> bool:
        return self.cell.settings.round is None or self.round_job is not None


@dataclass(frozen=True)
class _Weight:
    """U-Net rows of a cell's jobs, to tell how far the whole is."""

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
    """Run what has no record yet, and return when every chosen cell has ended.

    Args:
        experiment: The matrix.
        client: A client of the service.
        out: Records go to `out/<name of the experiment>/`.
        selection: Which cells; all if not given.
        parallel: Cells under way at once; if not given as many as the service has workers.
        show: Called with the state after each look at the jobs.
        poll_seconds: Pause between two looks.
        patience_seconds: How long the service may be away before UnreachableError is raised.

    Returns:
        The cells with a record, and the failed ones. A failed job does not stop the others.

    Raises:
        ExperimentError: The service refuses the settings of a cell; nothing was started.
        RecordError: A file under the name of a record holds none.
        ApiError: The service cannot be used.
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
            known = record_of(self.folder, cell) is not None
            (self.done if known else self.waiting).append(cell)
        recorded = len(self.done)

        if self.waiting:
            self._patiently(self._prepare)
        self._started_at = time.monotonic()
        while self.waiting or self.active:
            self._patiently(self._look)
            show(self._state())
            if self.waiting or self.active:
                time.sleep(poll_seconds)
        return RunResult(tuple(self.done), recorded, tuple(self.failures))

    def _patiently(self, action: Callable[[], None]) -> None:
        """Repeat `action` while the service is away; every action can be repeated."""
        until = time.monotonic() + self.patience_seconds
        while True:
            try:
                return action()
            except _PASSING:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    # before the first job

    def _prepare(self) -> None:
        """Add the prompts that the file holds, and let the service check every cell. Raises ExperimentError."""
        lists = {cell.list_name for cell in self.waiting}
        for name, prompts in self.experiment.prompt_lists.items():
            if name in lists:
                self._add_prompts(prompts)
        for cell in self.waiting:
            self.weights[cell.settings.key] = self._weigh(cell)

    def _add_prompts(self, spec: PromptListSpec) -> None:
        for prompts in (spec.train, spec.held_out):
            if isinstance(prompts, tuple):
                self.client.add_prompt_set(set_name(prompts), prompts, description="Prompts of an experiment's file")

    def _weigh(self, cell: Cell) -> _Weight:
        """The cell's work by the service's own estimate, which checks its settings, too."""
        evaluation = evaluation_body(cell.settings, [cell.settings.model])
        measured = self._estimate(cell, JobKind.EVALUATION, evaluation).unet_evaluations.evaluation
        rows = 0.0
        if cell.round_body is not None:
            counts = self._estimate(cell, JobKind.ROUND, cell.round_body).unet_evaluations
            rows = counts.total_at_most + (_BACKWARD_WORK - 1) * counts.training_at_most
        return _Weight(rows, measured * len(cell.settings.rounds))

    def _estimate(self, cell: Cell, kind: JobKind, body: Mapping[str, Any]) -> EstimateOut:
        try:
            return self.client.estimate(kind, body)
        except InvalidError as error:
            fields = [FieldError(pointer=f"{cell.name}: {e.pointer}", message=e.message) for e in error.errors]
            raise ExperimentError(f"the service refuses the {kind} of {cell.name}: {error.detail}", fields) from error

    # while jobs run

    def _look(self) -> None:
        """Look at every job once; start cells where there is room."""
        for active in list(self.active):
            active.job = self.client.job(active.job.id)
            if active.job.state.is_final:
                self._proceed(active)
        while self.waiting and len(self.active) < self._room():
            try:
                self._begin(self.waiting[0])
            except TooManyRequestsError:  # others fill the queue: there is no room now
                return

    def _room(self) -> int:
        """Cells that may be under way at once."""
        if self.parallel is not None:
            return self.parallel
        workers = self.client.workers().data
        return max(1, sum(worker.state != SILENT and _GPU_QUEUE in worker.queues for worker in workers))

    def _begin(self, cell: Cell) -> None:
        """Post the cell's first job, or get the one that an earlier run has posted."""
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
        """The job with these settings; where it has failed before, its latest retry. Its label names the revision."""
        key = f"experiment-{kind}-{digest(body)}"
        job = self.client.submit(kind, body, idempotency_key=key)
        while has_failed(job):
            job = self.client.retry(job.id, idempotency_key=f"{key}-after-{job.id}")
        return job

    def _proceed(self, active: _Active) -> None:
        """What follows a job that has ended: the evaluation, the record, or a failure."""
        cell, job = active.cell, active.job
        try:
            if has_failed(job):
                why = f"{job.error.code}: {job.error.message}" if job.error else "it was cancelled"
                self.failures.append(Failure(cell, job.id, f"the {job.kind} {job.state}: {why}"))
            elif not active.is_evaluated:
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
        running = tuple(Running(one.cell, one.job, self._percent(one)) for one in self.active)
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
        of_job = active.job.progress.percent / 100
        done = weight.round + weight.evaluation * of_job if active.is_evaluated else weight.round * of_job
        return 100 * done / weight.total if weight.total else 0.0

    def _work_done(self) -> float:
        """Of the cells that had no record when the run began."""
        ended = [*self.done, *(failure.cell for failure in self.failures)]
        keys = {cell.settings.key for cell in ended}
        done = sum(weight.total for key, weight in self.weights.items() if key in keys)
        return done + sum(self.weights[one.cell.settings.key].total * self._percent(one) / 100 for one in self.active)

    def _seconds_left(self, done: float, total: float) -> float | None:
        """At the speed of this run so far; None until it has done something."""
        if self._work_at_start is None:
            self._work_at_start = done
        gained = done - self._work_at_start
        if gained <= 0:
            return None
        return (total - done) * (time.monotonic() - self._started_at) / gained
