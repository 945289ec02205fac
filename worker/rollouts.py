"""The rollout of a round or a sampling: its samples with the scores of all shards, and its metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from sqlalchemy.orm import Session

from dfusion.rewards.config import WeightedScorerConfig
from service.db.clock import now_seconds
from service.db.tables import Metric
from service.errors import ConflictError
from service.jobs.execution import Claim
from service.jobs.kinds import JobSpec, RoundSpec, SamplingJobSpec, ScorerRef
from service.states import DIVERSITY, SHARE, SampleRole, Split, StageKind
from worker.inputs import load_round_samples
from worker.scoring import CompleteScores, ScoredSamples, ScoringSummary, load_scores, load_summaries


@dataclass(frozen=True)
class Rollout:
    """The samples of a round or a sampling.

    Attributes:
        samples: The samples with their scores, by prompt and number.
        summaries: The summaries of the shards that scored them.
    """

    samples: ScoredSamples
    summaries: Sequence[ScoringSummary]


def load_rollout(session: Session, claim: Claim) -> Rollout:
    """Load the samples of the claim's round and their scores."""
    samples = load_round_samples(session, claim.job_id, claim.round, [SampleRole.PLAIN])
    return Rollout(load_scores(session, samples), load_summaries(session, claim, StageKind.SCORE))


def rollout_scorers(spec: JobSpec) -> Sequence[ScorerRef]:
    """The scorers of the samples: of a round, the reward, the held-out scorer, and the parts of a reward that is a sum.

    A normalised sum has no scores before those of its parts are joined, so only its parts are listed. Raises
    ConflictError for jobs without samples.
    """
    match spec:
        case RoundSpec(reward=reward, watch=watch) if reward is not None:
            parts = part_names(spec)
            first = [] if is_normalised(reward) else [reward]
            others = [name for name in (watch, *parts) if name is not None and name != reward]
            return [*first, *dict.fromkeys(others)]
        case SamplingJobSpec(scorers=scorers):
            return scorers or ()
        case _:
            raise ConflictError(f"{type(spec).__name__} jobs have no scoring stage")


def is_normalised(reward: ScorerRef | None) -> bool:
    """Whether the reward is a sum that is normalised by the run's scale."""
    return isinstance(reward, WeightedScorerConfig) and reward.normalise


def part_names(spec: RoundSpec) -> list[str]:
    """The scorers that the reward of a round is the sum of; empty if it is no sum."""
    return [part.scorer for part in spec.reward.parts] if isinstance(spec.reward, WeightedScorerConfig) else []


def rollout_metrics(
    claim: Claim, rollout: Rollout, scores: Sequence[CompleteScores], shares: Mapping[str, float] = MappingProxyType({})
) -> list[Metric]:
    """The mean by each scorer, and the diversity if all shards measured it with the same features.

    Args:
        claim: The stage.
        rollout: The samples.
        scores: Their scores, the reward first.
        shares: The share of each part in the variance of a reward that is a sum, by name.
    """
    samples = [sample.row for sample in rollout.samples.samples]
    if not samples:
        return []

    # 1. the values of each metric
    series: list[tuple[str, str, list[float]]] = []
    for complete in scores:
        values = [complete.by_sample[sample.id] for sample in samples]
        series.append((complete.scorer.name, complete.scorer.version, values))

    features = {summary.features for summary in rollout.summaries}
    diversity = list(chain.from_iterable(summary.diversity for summary in rollout.summaries))
    if len(features) == 1 and diversity:
        series.append((DIVERSITY, features.pop(), diversity))

    for name, share in shares.items():
        series.append((f"{SHARE}{name}", scores[0].scorer.version, [share] * len(samples)))

    # 2. their rows
    return [
        Metric(
            job_id=claim.job_id,
            round=claim.round,
            split=Split.ROLLOUT,
            scorer=name,
            version=version,
            model_id=samples[0].model_id,
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.pstdev(values),
            created_at=now_seconds(),
        )
        for name, version, values in series
    ]
