"""Compare: what the evaluation's shards add up to, and, between models, which is better and how sure that is."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy.orm import Session

from dfusion.evaluation import Bootstrap, ScoreRow, ScoreTable, Summary, compare, summarise
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Metric, Sample, Score
from service.jobs.kinds import EvaluationJobSpec
from service.states import SampleRole
from worker.context import Record, StageContext
from worker.scoring import scores_by
from worker.stages.evaluate import Measuring


def run(context: StageContext) -> Record:
    """Metrics by model, split and scorer; for an evaluation the comparison, too."""
    with context.reading() as session:
        samples = results.samples_of_job(session, context.claim.job_id, context.claim.round, SampleRole.EVALUATION)
    scores, late = _scores(context, samples)
    metrics = list(_metrics(context, samples, scores))
    spec = context.spec
    result = None
    if isinstance(spec, EvaluationJobSpec):
        with context.reading() as session:
            first = jobs.get(session, context.claim.job_id).model_id
        result = _comparison(spec, first, samples, scores)

    def record(session: Session) -> None:
        results.add_scores(session, late)
        results.add_all(session, metrics)
        if result is not None:
            jobs.set_result(session, context.claim.job_id, result)

    return record


def _scores(context: StageContext, samples: Sequence[Sample]) -> tuple[Mapping[str, Sequence[Score]], list[Score]]:
    """All samples by each scorer in this worker's version, and which of these scores are in no table yet: shards may
    have been scored by an older version."""
    found: dict[str, list[Score]] = {sample.id: [] for sample in samples}
    late: list[Score] = []
    for ref in Measuring.of(context).scorers:
        scorer = context.bench.scorer(ref)
        known = scores_by(context, scorer, samples)
        late += known.found
        for sample_id, value in known.by_sample.items():
            row = Score(sample_id=sample_id, scorer=scorer.name, version=scorer.version, value=value)
            found[sample_id].append(row)
    return found, late


def _metrics(
    context: StageContext, samples: Sequence[Sample], scores: Mapping[str, Sequence[Score]]
) -> Iterator[Metric]:
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for sample in samples:
        for score in scores[sample.id]:
            key = (sample.model_id, sample.split, score.scorer, score.version)
            groups.setdefault(key, []).append(score.value)
    for (model, split, scorer, version), values in groups.items():
        yield Metric(
            job_id=context.claim.job_id,
            round=context.claim.round,
            split=split,
            scorer=scorer,
            version=version,
            model_id=model,
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.pstdev(values),
            created_at=now_seconds(),
        )


def _comparison(
    spec: EvaluationJobSpec, first: str | None, samples: Sequence[Sample], scores: Mapping[str, Sequence[Score]]
) -> dict[str, Any]:
    """By split: every model by every scorer with its interval, and every model against the request's first, image by
    image. Which shard was done first does not matter."""
    bootstrap = Bootstrap(spec.confidence, spec.resamples, seed=0)
    splits = dict.fromkeys(sample.split for sample in samples)
    return {
        "confidence": spec.confidence,
        "splits": {
            split: _of_split([sample for sample in samples if sample.split == split], first, scores, bootstrap)
            for split in splits
        },
    }


def _of_split(
    samples: Sequence[Sample], first: str | None, scores: Mapping[str, Sequence[Score]], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Prompts are identified by their place, too: a list may hold one twice."""
    table = ScoreTable.from_rows(
        ScoreRow(sample.model_id, f"{sample.prompt_index}: {sample.prompt}", sample.seed, score.scorer, score.value)
        for sample in sorted(samples, key=lambda s: (s.model_id != first, s.prompt_index, s.number))
        for score in scores[sample.id]
    )
    baseline, *others = table.models
    comparisons = (compare(table, other, baseline, scorer, bootstrap) for other in others for scorer in table.scorers)
    return {
        "models": [_summary(summary) for summary in summarise(table, bootstrap)],
        "compared_with_the_first": [
            asdict(one) | {"chance_by_prompt": one.prompts.chance, "chance_by_image": one.images.chance}
            for one in comparisons
        ],
    }


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "model": summary.model,
        "scorer": summary.scorer,
        **asdict(summary.overall),
        "prompts": [
            {"prompt": prompt.partition(": ")[2], **asdict(estimate)} for prompt, estimate in summary.prompts.items()
        ],
    }
