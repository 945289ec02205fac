"""Select: choose references and bases by score, or use the samples that a fusion names; the metrics of a round."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, cast

from sqlalchemy.orm import Session

from dfusion.config import PairingConfig
from dfusion.pairing import choose_pairs
from dfusion.rewards.config import WeightedScorerConfig
from dfusion.rewards.weighted import WeightedScorer
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Metric, Pair, Sample, Score
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import FusionJobSpec, RoundSpec
from service.states import StageKind
from worker.context import StageContext
from worker.inputs import StoredSample, load_prompts, spec_as
from worker.pairs import load_samples_to_fuse, load_sides_to_fuse
from worker.rollouts import Rollout, is_normalised, load_rollout, part_names, rollout_metrics, rollout_scorers
from worker.scoring import (
    CompleteScores,
    ScalesByVersion,
    ScorerVersion,
    join_scores,
    load_scales,
    load_scores,
    load_summaries,
    scaled_sum,
    score_rows,
)
from worker.stages.base import Stage

_MAX_UNPAIRED = 100
"""Prompts without a pair that an event names."""
_Sides = tuple[Sample, Sample]
"""A reference and a base."""
_Thresholds = Mapping[tuple[str | None, int], Sequence[float] | None]
"""Keyed by prompt set and index, because a text can occur more than once with different items."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a select stage.

    Attributes:
        rollout: The samples of the round or the fusion with their scores, by prompt and number.
        named: The (reference, base) samples that the request names; empty if they are chosen by score.
        thresholds: Mask thresholds by prompt set and index; None if they are computed from its maps.
        scales: The scales of a normalised reward's parts.
    """

    rollout: Rollout
    named: Sequence[_Sides]
    thresholds: _Thresholds
    scales: ScalesByVersion = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """Outputs of a select stage.

    Attributes:
        scores: New scores of samples, if the shards were scored by different versions of the scorer.
        pairs: The pairs in order.
        samples: The number of samples they were chosen from.
        unpaired: The prompts without a pair, since no reference scores more than its base, and their highest score.
        metrics: The round's mean by each scorer, and its diversity; empty for a fusion.
    """

    scores: Sequence[Score]
    pairs: Sequence[Pair]
    samples: int
    unpaired: Sequence[tuple[str, float]]
    metrics: Sequence[Metric] = ()


def load(session: Session, claim: Claim) -> Inputs:
    """Load the samples with their scores, and the thresholds of their prompts. Raises ConflictError."""
    match claim.spec:
        case RoundSpec() as spec:
            rollout = load_rollout(session, claim)
            thresholds = _load_thresholds(session, rollout.samples.samples)
            scales = load_scales(session, claim, part_names(spec)) if is_normalised(spec.reward) else {}
            return Inputs(rollout, [], thresholds, scales)

        case FusionJobSpec() as spec:
            samples = load_samples_to_fuse(session, claim, spec)
            thresholds = _load_thresholds(session, samples)
            own = results.get_pair(session, spec.pair).thresholds if spec.pair else None
            if spec.thresholds or own:
                thresholds = dict.fromkeys(thresholds, spec.thresholds or own)
            rollout = Rollout(load_scores(session, samples), load_summaries(session, claim, StageKind.SCORE))
            return Inputs(rollout, load_sides_to_fuse(session, spec), thresholds)

        case spec:
            raise ConflictError(f"{type(spec).__name__} jobs have no selection stage")


def _load_thresholds(session: Session, samples: Iterable[StoredSample]) -> _Thresholds:
    """The thresholds of all prompts in the prompt sets of the samples."""
    thresholds: dict[tuple[str | None, int], Sequence[float] | None] = {}
    for set_id in {sample.row.prompt_set_id for sample in samples}:
        for index, prompt in enumerate(load_prompts(session, set_id)):
            thresholds[set_id, index] = prompt.thresholds
    return thresholds


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Pair the samples by score, or as named by the request; compute the metrics of a round."""
    claim = context.claim
    spec = spec_as(claim, RoundSpec, FusionJobSpec)
    rollout = inputs.rollout

    # 1. the scores of all shards
    scorer_refs = rollout_scorers(spec) if isinstance(spec, RoundSpec) else [spec.reward or ""]
    scores = join_scores(context, scorer_refs, rollout.samples, rollout.summaries)
    shares: Mapping[str, float] = {}
    if isinstance(spec, RoundSpec) and isinstance(spec.reward, WeightedScorerConfig):
        scores, shares = _sum_parts(context, spec, inputs, scores)
    new = list(chain.from_iterable(complete.new for complete in scores))
    reward = scores[0]

    # 2. the pairs
    samples = [sample.row for sample in rollout.samples.samples]
    sides = inputs.named
    unpaired: list[tuple[str, float]] = []
    if not sides:
        sides, unpaired = _choose(samples, reward.by_sample, spec.pairing)
    pairs = [
        _pair(claim, number, reference, base, reward, inputs.thresholds)
        for number, (reference, base) in enumerate(sides)
    ]
    if not isinstance(spec, RoundSpec):
        return Outputs(new, pairs, len(samples), unpaired)
    if spec.review_pairs is not None and spec.review_pairs < len(pairs):
        generator = random.Random(f"review {spec.seed} {claim.round}")
        for pair in generator.sample(pairs, len(pairs) - spec.review_pairs):
            pair.review_exempt = True

    # 3. the metrics of the round
    return Outputs(new, pairs, len(samples), unpaired, rollout_metrics(claim, rollout, scores, shares))


def _sum_parts(
    context: StageContext, spec: RoundSpec, inputs: Inputs, scores: Sequence[CompleteScores]
) -> tuple[list[CompleteScores], dict[str, float]]:
    """The scores with those of the sum first, and each part's share of the sum's variance by name."""
    total = cast(WeightedScorer, context.load_scorer(spec.reward or ""))
    if total.normalise:
        total = scaled_sum(total, inputs.scales, scores)
    by_name = {complete.scorer.name: complete for complete in scores}
    samples = [sample.row.id for sample in inputs.rollout.samples.samples]
    parts = []
    for _, scorer in total.parts:
        part = by_name[scorer.name]
        parts.append([part.by_sample[sample] for sample in samples])

    shares = dict(zip(part_names(spec), total.shares(parts), strict=True)) if samples else {}
    if not total.normalise:
        return list(scores), shares
    values = total.combined(parts)
    rows = score_rows([total], samples, [values])
    complete = CompleteScores(ScorerVersion.of(total), dict(zip(samples, values, strict=True)), rows)
    return [complete, *scores], shares


def _choose(
    samples: Sequence[Sample], scores: Mapping[str, float], pairing: PairingConfig
) -> tuple[list[_Sides], list[tuple[str, float]]]:
    """The pairs of all prompts, and the prompts without any, with their highest score."""
    sides = []
    unpaired = []
    for _, group in groupby(samples, key=lambda sample: sample.prompt_index):
        members = list(group)
        chosen = choose_pairs([scores[sample.id] for sample in members], pairing)
        sides += [(members[pair.reference], members[pair.base]) for pair in chosen]
        if not chosen:
            unpaired.append((members[0].prompt, max(scores[sample.id] for sample in members)))
    return sides, unpaired


def _pair(
    claim: Claim,
    number: int,
    reference: Sample,
    base: Sample,
    reward: CompleteScores,
    thresholds: _Thresholds,
) -> Pair:
    own = thresholds.get((reference.prompt_set_id, reference.prompt_index))
    return Pair(
        id=new_id(IdKind.PAIR),
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        number=number,
        prompt_set_id=base.prompt_set_id,
        prompt_index=base.prompt_index,
        prompt=base.prompt,
        reference_id=reference.id,
        base_id=base.id,
        scorer=reward.scorer.name,
        scorer_version=reward.scorer.version,
        reference_score=reward.by_sample[reference.id],
        base_score=reward.by_sample[base.id],
        thresholds=None if own is None else list(own),
        statistics={},
        created_at=now_seconds(),
    )


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert scores, metrics and pairs, and set the roles of the paired samples."""
    results.add_scores(session, outputs.scores)
    results.add_all(session, [*outputs.metrics, *outputs.pairs])
    results.mark_paired(session, claim.job_id, claim.round)

    message = f"{len(outputs.pairs)} pairs from {outputs.samples} samples"
    data: dict[str, Any] = {"round": claim.round, "pairs": len(outputs.pairs), "samples": outputs.samples}
    data["prompts_without_pair"] = len(outputs.unpaired)
    if outputs.unpaired:
        message += f"; prompts whose best samples score no more than the others have none: {len(outputs.unpaired)}"
        examples = [{"prompt": prompt, "score": score} for prompt, score in outputs.unpaired[:_MAX_UNPAIRED]]
        data["examples"] = examples
    jobs.add_event(session, claim.job_id, jobs.PAIRED, message, claim.stage_id, **data)


STAGE = Stage(load, compute, record)
