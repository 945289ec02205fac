"""Compare: metrics over all shards of an evaluation or a sampling; an evaluation also compares its models in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

from sqlalchemy.orm import Session

from dfusion.evaluation import Bootstrap, Comparison, ScoreRow, ScoreTable, Summary, compare, summarise
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Metric, Sample, Score
from service.jobs.execution import Claim
from service.jobs.kinds import EvaluationJobSpec, SamplingJobSpec
from service.states import SampleRole, StageKind
from worker.context import StageContext
from worker.inputs import load_samples
from worker.rollouts import Rollout, load_rollout, rollout_metrics, rollout_scorers
from worker.scoring import CompleteScores, join_scores, load_scores, load_summaries
from worker.stages.base import Stage
from worker.stages.evaluate import Measurement


@dataclass(frozen=True)
class Inputs:
    """Inputs of a compare stage.

    Attributes:
        rollout: The samples with their scores: of an evaluation by split, prompt and number, of a sampling by prompt
            and number.
        baseline_id: The first model of the request, with which an evaluation compares the others.
    """

    rollout: Rollout
    baseline_id: str | None


@dataclass(frozen=True)
class Outputs:
    """Outputs of a compare stage.

    Attributes:
        scores: New scores of samples, if the shards were scored by different versions of a scorer.
        metrics: Mean and deviation by model, split and scorer; the diversity of a sampling.
        comparison: The result of an evaluation, as GET /jobs/{id} returns it; None for rounds and samplings.
    """

    scores: Sequence[Score]
    metrics: Sequence[Metric]
    comparison: dict[str, Any] | None = None


def load(session: Session, claim: Claim) -> Inputs:
    """Load the samples of all shards with their scores."""
    baseline_id = jobs.get(session, claim.job_id).model_id
    if isinstance(claim.spec, SamplingJobSpec):
        return Inputs(load_rollout(session, claim), baseline_id)

    rows = results.samples_of_job(session, claim.job_id, claim.round, SampleRole.EVALUATION)
    samples = load_scores(session, list(load_samples(session, rows).values()))
    return Inputs(Rollout(samples, load_summaries(session, claim, StageKind.EVALUATE)), baseline_id)


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Compute metrics by model, split and scorer; for an evaluation, also compare the models."""
    spec = context.claim.spec
    rollout = inputs.rollout
    scorer_refs = rollout_scorers(spec) if isinstance(spec, SamplingJobSpec) else Measurement.of(spec).scorers
    joined = join_scores(context, scorer_refs, rollout.samples, rollout.summaries)
    new = list(chain.from_iterable(complete.new for complete in joined))
    if isinstance(spec, SamplingJobSpec):
        return Outputs(new, rollout_metrics(context.claim, rollout, joined))

    samples = [sample.row for sample in rollout.samples.samples]
    scores = _by_sample(samples, joined)
    comparison = None
    if isinstance(spec, EvaluationJobSpec):
        comparison = _comparison(spec, inputs.baseline_id, samples, scores)
    return Outputs(new, _metrics(context.claim, samples, scores), comparison)


def _by_sample(samples: Sequence[Sample], joined: Sequence[CompleteScores]) -> dict[str, list[Score]]:
    """The scores of each sample by all scorers, in the order of the request."""
    scores: dict[str, list[Score]] = {sample.id: [] for sample in samples}
    for by_scorer in joined:
        scorer = by_scorer.scorer
        for sample_id, value in by_scorer.by_sample.items():
            score = Score(sample_id=sample_id, scorer=scorer.name, version=scorer.version, value=value)
            scores[sample_id].append(score)
    return scores


def _metrics(claim: Claim, samples: Sequence[Sample], scores: Mapping[str, Sequence[Score]]) -> list[Metric]:
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for sample in samples:
        for score in scores[sample.id]:
            key = (sample.model_id, sample.split, score.scorer, score.version)
            groups.setdefault(key, []).append(score.value)

    return [
        Metric(
            job_id=claim.job_id,
            round=claim.round,
            split=split,
            scorer=scorer,
            version=version,
            model_id=model_id,
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.pstdev(values),
            created_at=now_seconds(),
        )
        for (model_id, split, scorer, version), values in groups.items()
    ]


def _comparison(
    spec: EvaluationJobSpec, baseline_id: str | None, samples: Sequence[Sample], scores: Mapping[str, Sequence[Score]]
) -> dict[str, Any]:
    """The result by split: each model's mean by each scorer, and its paired difference to the first model.

    It does not depend on the order in which the shards finish.
    """
    bootstrap = Bootstrap(spec.confidence, spec.resamples, seed=0)
    by_split: dict[str, list[Sample]] = {}
    for sample in samples:
        by_split.setdefault(sample.split, []).append(sample)

    splits = {split: _split(members, baseline_id, scores, bootstrap) for split, members in by_split.items()}
    return {"confidence": spec.confidence, "splits": splits}


def _split(
    samples: Sequence[Sample], baseline_id: str | None, scores: Mapping[str, Sequence[Score]], bootstrap: Bootstrap
) -> dict[str, Any]:
    """The models on one split. Prompts are keyed by index and text, because a list can contain a prompt twice."""
    ordered = sorted(samples, key=lambda s: (s.model_id != baseline_id, s.prompt_index, s.number))
    rows = []
    for sample in ordered:
        prompt = f"{sample.prompt_index}: {sample.prompt}"
        for score in scores[sample.id]:
            rows.append(ScoreRow(sample.model_id, prompt, sample.seed, score.scorer, score.value))

    table = ScoreTable.from_rows(rows)
    baseline, *models = table.models
    comparisons = [
        compare(table, model, baseline, scorer, bootstrap) for model, scorer in product(models, table.scorers)
    ]
    return {
        "models": [_summary(summary) for summary in summarise(table, bootstrap)],
        "compared_with_the_first": [_against_baseline(comparison) for comparison in comparisons],
    }


def _against_baseline(comparison: Comparison) -> dict[str, Any]:
    chances = {"chance_by_prompt": comparison.prompts.chance, "chance_by_image": comparison.images.chance}
    return asdict(comparison) | chances


def _summary(summary: Summary) -> dict[str, Any]:
    prompts = [
        {"prompt": prompt.partition(": ")[2], **asdict(estimate)} for prompt, estimate in summary.prompts.items()
    ]
    return {"model": summary.model, "scorer": summary.scorer, **asdict(summary.overall), "prompts": prompts}


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert scores and metrics, and set the job's result."""
    results.add_scores(session, outputs.scores)
    results.add_all(session, outputs.metrics)
    if outputs.comparison is not None:
        jobs.set_result(session, claim.job_id, outputs.comparison)


STAGE = Stage(load, compute, record)
