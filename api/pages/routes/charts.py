"""The data of the charts on a run's page, which its script reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.jobs import metric_out
from api.deps import ServiceDep
from service.db.queries import jobs, results
from service.db.tables import Artifact, Job, Metric, Model
from service.service import Service

router = APIRouter(include_in_schema=False, dependencies=[require_scope("read")])
_ROUNDS = 200
"""The last rounds whose scores are shown."""
_LOGS = 6
"""The last trainings whose updates are shown."""
_MAX_LOG_BYTES = 8_000_000
_PROMPT_ROUNDS = 40
_MAX_PROMPT_IMAGES = 20_000
"""A run with more images has no curves by prompt, since each of them is read."""
_OF_AN_UPDATE = ("loss", "kl", "ratio_max", "grad_norm", "log_ratio_preferred", "log_ratio_rejected")


@router.get("/jobs/{job_id}/charts")
def get_charts(job_id: str, service: ServiceDep) -> dict[str, Any]:
    """Return the scores by round, the scores by prompt, and the statistics of each update."""
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        last_round = job.last_round or 0
        rounds = range(max(0, last_round - _ROUNDS + 1), last_round + 1)
        metrics = results.metrics(session, job.id, rounds)
        images_per_round = jobs.images_per_round(session, job.id)
        models = results.models_of_job(session, job.id, range(max(1, last_round - _LOGS + 1), last_round + 1))
        logs = _logs(session, models)
        reward = job.spec.get("reward")
        scorer = reward if isinstance(reward, str) else next(iter(sorted({row.scorer for row in metrics})), None)
        prompts = _prompts(session, job, scorer)

    return {
        "scorer": scorer,
        "scores": [_score(row, images_per_round) for row in metrics],
        "prompts": prompts,
        "updates": list(_updates(service, models, logs)),
    }


def _score(row: Metric, images_per_round: int) -> dict[str, Any]:
    metric = metric_out(row, images_per_round)
    return metric.model_dump(include={"round", "split", "scorer", "training_images", "mean", "count"})


def _prompts(session: Session, job: Job, scorer: str | None) -> list[dict[str, Any]] | None:
    """The mean scores of each prompt by round; None if they would take too long."""
    if scorer is None or job.samples_made > _MAX_PROMPT_IMAGES:
        return None
    last_round = job.last_round or 0
    rounds = range(max(0, last_round - _PROMPT_ROUNDS + 1), last_round + 1)

    by_prompt: dict[int, dict[str, Any]] = {}
    for index, prompt, number, mean in results.prompt_means(session, job.id, scorer, rounds):
        by_prompt.setdefault(index, {"prompt": prompt, "points": []})["points"].append([number, mean])
    return list(by_prompt.values())


def _logs(session: Session, models: Sequence[Model]) -> dict[str, Artifact]:
    """The stored logs of these trainings, by id."""
    return results.artifacts(session, [_log_id(model) for model in models])


def _log_id(model: Model) -> str:
    return str(model.statistics.get("log", "")).rpartition("/")[2]


def _updates(service: Service, models: Sequence[Model], logs: dict[str, Artifact]) -> Iterator[dict[str, Any]]:
    """The statistics of each update of these trainings, in order, numbered over all of them."""
    number = 0
    for model in models:
        log = logs.get(_log_id(model))
        if log is None or log.size_bytes > _MAX_LOG_BYTES:
            continue
        content = json.loads(b"".join(service.store.read(log.key, 0, log.size_bytes)))
        for update in content["updates"]:
            number += 1
            yield {"number": number, "round": model.round, **{name: update.get(name) for name in _OF_AN_UPDATE}}
