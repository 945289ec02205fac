"""Collects a cell's record from the service."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import fmean
from typing import Any

from api.client import Client, NotFoundError
from api.experiments.cells import Cell
from api.experiments.records import (
    JobFacts,
    MetricFacts,
    Numbers,
    PairFacts,
    Record,
    RoundFacts,
    ScoreFacts,
    TrainingFacts,
    flatten,
)
from api.wire.jobs import JobDetail, MetricOut
from api.wire.models import ModelOut
from api.wire.pairs import PairOut
from service.states import JobState, Split, StageState

SILENT = "silent"
"""State of a worker that has stopped reporting."""


def models_after(client: Client, cell: Cell, round_job: JobDetail | None) -> dict[int, str]:
    """Return the id or name of the model after each measured round.

    A round that had nothing to train on keeps the model of the round before.
    """
    trained = {} if round_job is None else {m.round: m.id for m in client.models(job=round_job.id)}
    models: dict[int, str] = {}
    for measured in cell.settings.rounds:
        rounds = [number for number in trained if number is not None and number <= measured]
        models[measured] = trained[max(rounds)] if rounds else cell.settings.model
    return models


def collect(client: Client, experiment: str, cell: Cell, round_job: JobDetail | None, evaluation: JobDetail) -> Record:
    """Collect the record of a cell whose jobs have succeeded.

    Args:
        client: A client of the service.
        experiment: The experiment's name.
        cell: The cell.
        round_job: Its round job; None for the model before training.
        evaluation: Its evaluation job.

    Returns:
        The record.

    Raises:
        ApiError: The service cannot be read.
    """
    jobs = {"evaluation": evaluation} if round_job is None else {"round": round_job, "evaluation": evaluation}
    devices = {worker.device for worker in client.workers().data if worker.state != SILENT}
    rounds = () if round_job is None else _rounds(client, round_job)
    prompts, scores = _scores(client, cell, round_job, evaluation, {facts.round: facts.images for facts in rounds})

    return Record(
        experiment=experiment,
        list=cell.list_name,
        arm=cell.arm,
        seed=cell.seed,
        key=cell.settings.key,
        settings=cell.settings.model_dump(mode="json"),
        service=client.version(),
        devices=tuple(sorted(devices)),
        jobs={kind: _job(client, job) for kind, job in jobs.items()},
        prompts=prompts,
        rounds=rounds,
        scores=scores,
    )


def _job(client: Client, job: JobDetail) -> JobFacts:
    seconds: dict[str, float] = defaultdict(float)
    for stage in client.stages(job.id, state=StageState.SUCCEEDED):
        seconds[stage.kind] += _seconds(stage.started_at, stage.finished_at) or 0.0

    return JobFacts(
        id=job.id,
        origin=job.origin,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        seconds=_seconds(job.started_at, job.finished_at),
        stage_seconds={kind: round(total, 3) for kind, total in sorted(seconds.items())},
    )


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else round((end - start).total_seconds(), 3)


def _rounds(client: Client, job: JobDetail) -> tuple[RoundFacts, ...]:
    metrics = client.metrics(job.id).data
    models = {model.round: model for model in client.models(job=job.id)}
    pairs = pair_facts(client, job.id)

    rounds = []
    images = 0
    for number in range(1, job.rounds + 1):
        round_metrics = [metric for metric in metrics if metric.round == number]
        images += max((metric.count for metric in round_metrics if metric.split == Split.ROLLOUT), default=0)
        model = models.get(number)
        rounds.append(
            RoundFacts(
                round=number,
                images=images,
                model=None if model is None else model.id,
                metrics=tuple(_metric(metric) for metric in round_metrics),
                pairs=pairs.get(number) or _pairs(()),
                training=None if model is None else _training(client, model),
            )
        )
    return tuple(rounds)


def _metric(metric: MetricOut) -> MetricFacts:
    return MetricFacts.model_validate(metric.model_dump(include=set(MetricFacts.model_fields)))


def pair_facts(client: Client, job_id: str) -> dict[int, PairFacts]:
    """Summarize a job's pairs by round."""
    pairs: dict[int, list[PairOut]] = defaultdict(list)
    for pair in client.pairs(job=job_id):
        pairs[pair.round].append(pair)
    return {number: _pairs(round_pairs) for number, round_pairs in pairs.items()}


def _pairs(pairs: Sequence[PairOut]) -> PairFacts:
    values: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        for name, value in flatten(pair.statistics):
            values[name] += [] if value is None else [value]

    return PairFacts(
        pairs=len(pairs),
        targets=sum(pair.target is not None for pair in pairs),
        adopted=sum(bool(pair.adopted) for pair in pairs),
        means={name: fmean(numbers) if numbers else None for name, numbers in sorted(values.items())},
    )


def _training(client: Client, model: ModelOut) -> TrainingFacts:
    statistics = {name: value for name, value in model.statistics.items() if name != "log"}
    return TrainingFacts(figures=statistics, updates=updates_of(client, model.statistics))


def updates_of(client: Client, statistics: Mapping[str, Any]) -> tuple[Numbers, ...]:
    """Read the numbers of each update from a training's log; empty if the log was deleted."""
    link = statistics.get("log")
    if not isinstance(link, str):
        return ()
    try:
        log = json.loads(client.read(link))
    except NotFoundError:
        return ()

    updates = []
    for update in log["updates"]:
        update.pop("steps", None)  # numbers of single denoising steps
        updates.append(dict(flatten(update)))
    return tuple(updates)


def _scores(
    client: Client,
    cell: Cell,
    round_job: JobDetail | None,
    evaluation: JobDetail,
    images: Mapping[int, int],
) -> tuple[dict[str, tuple[str, ...]], tuple[ScoreFacts, ...]]:
    """Read the prompts by split, and the scores of the model after each measured round."""
    models = models_after(client, cell, round_job)
    ids = {name: client.model(name).id for name in set(models.values())}
    versions = {(m.split, m.scorer): m.version for m in client.metrics(evaluation.id).data}
    splits: Mapping[str, Any] = (evaluation.result or {})["splits"]

    prompts: dict[str, tuple[str, ...]] = {}
    scores = []
    for split, name in cell.settings.splits.items():
        prompt_set = client.prompt_set(name).name or name  # the result uses the name of a set that is given by id
        results = splits[prompt_set]["models"]
        by_model = {(result["model"], result["scorer"]): result["prompts"] for result in results}
        scorers = list(dict.fromkeys(scorer for _, scorer in by_model))
        for number, model in models.items():
            for scorer in scorers:
                measured = by_model[ids[model], scorer]
                prompts[split] = tuple(prompt["prompt"] for prompt in measured)
                scores.append(
                    ScoreFacts(
                        round=number,
                        images=images.get(number, 0),
                        model=ids[model],
                        split=split,
                        scorer=scorer,
                        version=versions[prompt_set, scorer],
                        means=tuple(prompt["mean"] for prompt in measured),
                    )
                )
    return prompts, tuple(scores)


def has_failed(job: JobDetail) -> bool:
    """Whether a job has ended without success."""
    return job.state in (JobState.FAILED, JobState.CANCELLED)
