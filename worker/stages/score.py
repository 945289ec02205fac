"""Score: scores of a shard of samples, and their diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.db.queries import results
from service.db.tables import Score
from service.jobs.execution import Claim
from service.jobs.kinds import FusionJobSpec
from service.states import SampleRole
from worker.context import StageContext
from worker.inputs import load_round_samples, range_if_sharded
from worker.pairs import load_samples_to_fuse
from worker.rollouts import rollout_scorers
from worker.scoring import (
    ScoredSamples,
    ScorerVersion,
    ScoringSummary,
    load_scores,
    record_summary,
    score_images,
    score_missing,
    score_rows,
)
from worker.stages.base import Stage


@dataclass(frozen=True)
class Inputs:
    """Inputs of a score stage: the samples of the shard, in a round or a sampling without scores."""

    samples: ScoredSamples


@dataclass(frozen=True)
class Outputs:
    """Outputs of a score stage: the new scores, and the summary for the stage that joins the shards."""

    scores: Sequence[Score]
    summary: ScoringSummary


def load(session: Session, claim: Claim) -> Inputs:
    """Load the samples of the shard; for a fusion, stored samples with their scores."""
    if isinstance(claim.spec, FusionJobSpec):
        return Inputs(load_scores(session, load_samples_to_fuse(session, claim, claim.spec)))

    prompts = range_if_sharded(claim, "prompts")
    samples = load_round_samples(session, claim.job_id, claim.round, [SampleRole.PLAIN], prompts)
    return Inputs(ScoredSamples(samples, {}))


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Score the samples by all scorers of the job; for a fusion, samples without a score by its reward."""
    spec = context.claim.spec
    if isinstance(spec, FusionJobSpec):
        reward = context.load_scorer(spec.reward or "")
        return Outputs(score_missing(context, reward, inputs.samples).new, ScoringSummary.of([reward]))

    scorers = [context.load_scorer(scorer_ref) for scorer_ref in rollout_scorers(spec)]
    samples = inputs.samples.samples
    scored = score_images(context, scorers, samples)

    scores = score_rows(scorers, [sample.row.id for sample in samples], scored.values)
    diversity = scored.diversity([sample.row.prompt_index for sample in samples])
    versions = tuple(map(ScorerVersion.of, scorers))
    return Outputs(scores, ScoringSummary(versions, scored.features_name, tuple(diversity)))


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert the scores, and store the summary."""
    if isinstance(claim.spec, FusionJobSpec):
        results.add_scores(session, outputs.scores)
    else:
        results.add_all(session, outputs.scores)
    record_summary(session, claim, outputs.summary)


STAGE = Stage(load, compute, record)
