"""Score: scores of a job's samples, their diversity, and a warning if the reward is misleading."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from dfusion.rewards import Scorer
from dfusion.rewards.watch import falling_figures
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Metric, Score
from service.errors import ConflictError
from service.jobs.execution import Claim
from service.jobs.kinds import FusionJobSpec, JobSpec, RoundSpec, SamplingJobSpec, ScorerRef
from service.states import DIVERSITY, SampleRole, Split
from worker.context import StageContext
from worker.inputs import StoredSample, load_round_samples
from worker.pairs import load_samples_to_fuse
from worker.scoring import ImageScores, ScoredSamples, load_scores, score_images, score_missing, score_rows
from worker.stages.base import Stage


@dataclass(frozen=True)
class Inputs:
    """Inputs of a score stage.

    Attributes:
        samples: The round's samples without scores; for a fusion, the stored samples to pair, with their scores.
        metrics: The metrics of the job's earlier rounds.
    """

    samples: ScoredSamples
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class Outputs:
    """Outputs of a score stage.

    Attributes:
        scores: The new scores.
        metrics: The round's mean by each scorer, and its diversity; empty for a fusion.
        misleading: A warning if the reward rises while other metrics fall; None otherwise.
    """

    scores: Sequence[Score]
    metrics: Sequence[Metric] = ()
    misleading: MisleadingReward | None = None


@dataclass(frozen=True)
class MisleadingReward:
    """A reward that rises while other metrics fall.

    Attributes:
        reward: The name of its scorer.
        falling: The names of the falling metrics.
    """

    reward: str
    falling: tuple[str, ...]


def load(session: Session, claim: Claim) -> Inputs:
    """Load the samples with their scores, and the metrics of earlier rounds."""
    if isinstance(claim.spec, FusionJobSpec):
        return Inputs(load_scores(session, load_samples_to_fuse(session, claim.spec)), [])

    samples = load_round_samples(session, claim.job_id, claim.round, [SampleRole.PLAIN])
    metrics = results.metrics(session, claim.job_id, range(claim.round))
    return Inputs(ScoredSamples(samples, {}), metrics)


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Score the job's samples by all its scorers; for a fusion, samples without a score by its reward."""
    spec = context.claim.spec
    if isinstance(spec, FusionJobSpec):
        return Outputs(score_missing(context, context.load_scorer(spec.reward or ""), inputs.samples).new)

    scorers = [context.load_scorer(scorer_ref) for scorer_ref in _scorers(spec)]
    samples = inputs.samples.samples
    prompts = [sample.row.prompt for sample in samples]
    scored = score_images(context, scorers, [sample.image for sample in samples], prompts)

    scores = score_rows(scorers, [sample.row.id for sample in samples], scored.values)
    metrics = _metrics(context.claim, samples, scorers, scored) if samples else []
    misleading = None
    if isinstance(spec, RoundSpec):
        misleading = _misleading(scorers[0], [*inputs.metrics, *sorted(metrics, key=lambda metric: metric.scorer)])
    return Outputs(scores, metrics, misleading)


def _scorers(spec: JobSpec) -> Sequence[ScorerRef]:
    match spec:
        case RoundSpec(reward=reward, watch=watch) if reward is not None:
            return [reward] if watch in (None, reward) else [reward, watch]
        case SamplingJobSpec(scorers=scorers):
            return scorers or ()
        case _:
            raise ConflictError(f"{type(spec).__name__} jobs have no scoring stage")


def _metrics(
    claim: Claim, samples: Sequence[StoredSample], scorers: Sequence[Scorer], scored: ImageScores
) -> list[Metric]:
    """The round's mean by each scorer, and its diversity."""
    series = [
        (scorer.name, scorer.version, values) for scorer, values in zip(scorers, scored.values, strict=True) if values
    ]
    diversity = scored.diversity([sample.row.prompt for sample in samples])
    if diversity is not None:
        series.append((DIVERSITY, scored.features_name, list(diversity.prompts.values())))

    return [
        Metric(
            job_id=claim.job_id,
            round=claim.round,
            split=Split.ROLLOUT,
            scorer=name,
            version=version,
            model_id=samples[0].row.model_id,
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.pstdev(values),
            created_at=now_seconds(),
        )
        for name, version, values in series
    ]


def _misleading(reward: Scorer, metrics: Sequence[Metric]) -> MisleadingReward | None:
    """Test whether the reward rises over the last rounds while other metrics fall.

    Args:
        reward: The reward's scorer.
        metrics: The metrics of all rounds up to this one, round by round.

    Returns:
        The reward and the falling metrics; None if it does not rise, or none falls.
    """
    series: dict[tuple[str, str], list[float]] = {}
    for metric in metrics:
        if metric.split == Split.ROLLOUT:
            series.setdefault((metric.scorer, metric.version), []).append(metric.mean)

    rewards = series.pop((reward.name, reward.version), [])
    others = {name: values for (name, _), values in series.items() if len(values) == len(rewards)}
    falling = falling_figures(rewards, others)
    return MisleadingReward(reward.name, falling) if falling else None


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert scores and metrics; warn of a misleading reward."""
    if isinstance(claim.spec, FusionJobSpec):
        return results.add_scores(session, outputs.scores)

    results.add_all(session, [*outputs.scores, *outputs.metrics])
    if outputs.misleading is not None:
        warning = outputs.misleading
        message = f"the reward {warning.reward} rises while {' and '.join(warning.falling)} fall: is it being gamed?"
        jobs.add_event(
            session,
            claim.job_id,
            "round.reward_misleads",
            message,
            claim.stage_id,
            falling=list(warning.falling),
        )


STAGE = Stage(load, compute, record)
