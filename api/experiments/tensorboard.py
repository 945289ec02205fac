"""TensorBoard event files of any job. The only module that imports tensorboardX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from api.client import Client
from api.experiments.collect import pair_facts, updates_of
from api.experiments.errors import ExperimentError, MissingExtraError
from api.wire.jobs import JobDetail, MetricOut
from service.states import JobKind

_EVENT_FILES = "events.out.tfevents.*"


@dataclass(frozen=True)
class Scalar:
    """A point of a curve. `run` is a subfolder of the job's folder; TensorBoard compares runs."""

    run: str
    tag: str
    step: int
    value: float
    at: datetime


def export_tensorboard(client: Client, job_id: str, out: Path) -> Path:
    """Write a job's curves as event files to `out/<job>`. Replaces those of an earlier export.

    Args:
        client: A client of the service.
        job_id: A job of any kind; it may still be running.
        out: The folder for `tensorboard --logdir`.

    Returns:
        The job's folder.

    Raises:
        ExperimentError: The job has no metrics, pairs or updates yet.
        MissingExtraError: tensorboardX is not installed.
        ApiError: The service cannot be read.
        OSError: A file cannot be written.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboardX") from error

    job = client.job(job_id)
    scalars = list(scalars_of(client, job))
    if not scalars:
        raise ExperimentError(f"{job.id} is {job.state} and has no metrics, pairs or updates to export")

    folder = out / job.id
    for file in list(folder.rglob(_EVENT_FILES)):
        file.unlink()
    for run in dict.fromkeys(scalar.run for scalar in scalars):
        with SummaryWriter(str(folder / run)) as writer:
            for scalar in scalars:
                if scalar.run == run:
                    writer.add_scalar(scalar.tag, scalar.value, scalar.step, walltime=scalar.at.timestamp())
    return folder


def scalars_of(client: Client, job: JobDetail) -> Iterator[Scalar]:
    """Yield scores by round, the numbers of each update, and means of the pairs by round.

    The step is the round for scores and pairs. For trainings it is the update, counted over all rounds. Each model of
    an evaluation is a separate run.
    """
    times = _times(client, job)
    metrics = client.metrics(job.id).data
    yield from _scores(job, metrics, times)
    yield from _updates(client, job, times)
    yield from _pairs(client, job, times)


def _times(client: Client, job: JobDetail) -> Mapping[int, datetime]:
    """Return the time of the last finished stage of each round that has started."""
    times: dict[int, datetime] = {}
    for stage in client.stages(job.id):
        time = stage.finished_at or job.started_at or job.created_at
        times[stage.round] = max(time, times.get(stage.round, time))
    return times


def _scores(job: JobDetail, metrics: Iterable[MetricOut], times: Mapping[int, datetime]) -> Iterator[Scalar]:
    for metric in metrics:
        run = metric.model if job.kind is JobKind.EVALUATION else ""
        time = times.get(metric.round, job.created_at)
        yield Scalar(run, f"{metric.split}/{metric.scorer}", metric.round, metric.mean, time)


def _updates(client: Client, job: JobDetail, times: Mapping[int, datetime]) -> Iterator[Scalar]:
    step = 0
    for model in sorted(client.models(job=job.id), key=lambda model: model.round or 0):
        time = times.get(model.round or 0, job.created_at)
        for update in updates_of(client, model.statistics):
            step += 1
            for name, value in update.items():
                if value is not None and name != "update":
                    yield Scalar("", f"training/{name}", step, float(value), time)


def _pairs(client: Client, job: JobDetail, times: Mapping[int, datetime]) -> Iterator[Scalar]:
    for number, facts in sorted(pair_facts(client, job.id).items()):
        time = times.get(number, job.created_at)
        yield Scalar("", "pairs/count", number, facts.pairs, time)
        if facts.targets:
            yield Scalar("", "pairs/share_adopted", number, facts.adopted / facts.targets, time)
        for name, value in facts.means.items():
            if value is not None:
                yield Scalar("", f"pairs/{name}", number, float(value), time)
