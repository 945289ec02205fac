"""Verify: score the targets of a shard of pairs, adopt them by Eq. 7, and measure each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from typing import Any

from sqlalchemy.orm import Session

from dfusion.errors import ScorerError
from dfusion.pair_metrics import PairSides, Side, covers_too_much, decide, fusion_mask, mask_image, pair_statistics
from dfusion.rewards import Scorer
from dfusion.rewards.weighted import WeightedScorer
from dfusion.types import Trajectory
from service.db.queries import jobs, results
from service.db.tables import Score
from service.jobs import execution
from service.jobs.execution import Claim
from service.jobs.kinds import FusionJobSpec, RoundSpec
from worker.context import ImageWriter, StageContext, batches
from worker.inputs import StoredSample, spec_as, trajectory_of
from worker.pairs import StoredPair, fusion_of, load_round_pairs
from worker.rollouts import is_normalised, part_names
from worker.scoring import ScalesByVersion, load_scales, scaled_sum, score_images, score_rows
from worker.stages.base import Stage


@dataclass(frozen=True)
class Inputs:
    """Inputs of a verify stage.

    Attributes:
        pairs: The pairs of the shard by number, with the targets of the fused ones.
        scales: The scales of a normalised reward's parts.
    """

    pairs: Sequence[StoredPair]
    scales: ScalesByVersion = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """Updated columns of a pair.

    Attributes:
        pair_id: The pair.
        values: `adopted` and `reason`; for a fused pair also the scores of its sides, its statistics and mask image.
    """

    pair_id: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Outputs:
    """Outputs of a verify stage.

    Attributes:
        scores: The scores of the targets, and those of other sides that were scored again.
        decisions: One per pair; those of fused pairs come first.
        targets: The number of pairs with a target.
        wide_masks: The number of masks that cover more of the image than the pairing allows.
    """

    scores: Sequence[Score]
    decisions: Sequence[Decision]
    targets: int
    wide_masks: int


def load(session: Session, claim: Claim) -> Inputs:
    """Load the pairs of the shard, and the scales of a normalised reward."""
    spec = claim.spec
    scales: ScalesByVersion = {}
    if isinstance(spec, RoundSpec) and is_normalised(spec.reward):
        scales = load_scales(session, claim, part_names(spec))
    return Inputs(load_round_pairs(session, claim), scales)


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Score the targets, decide on each pair, and store the masks. Raises ScorerError."""
    spec = spec_as(context.claim, RoundSpec, FusionJobSpec)
    fused = [pair for pair in inputs.pairs if pair.target is not None]
    without_target = [_without_target(pair) for pair in inputs.pairs if pair.target is None]
    if not fused:
        return Outputs([], without_target, 0, 0)

    # 1. the scores of the targets; after an upgrade of the scorer, also those of the other sides
    scorer = context.load_scorer(spec.reward or "")
    if isinstance(scorer, WeightedScorer) and scorer.normalise:
        scorer = scaled_sum(scorer, inputs.scales)
    targets = [pair.target for pair in fused if pair.target is not None]
    again = _sides_to_score_again(fused, scorer)
    scored_samples = [*targets, *again]
    scored = score_images(context, [scorer], scored_samples)
    scores = score_rows([scorer], [sample.row.id for sample in scored_samples], scored.values)
    score_by_sample = {score.sample_id: score.value for score in scores}
    _require_order(fused, scorer, score_by_sample)

    # 2. the decisions
    decisions = _decisions(context, fused, score_by_sample)
    covers = [decision.values["statistics"]["mask_cover"] for decision in decisions]
    wide_masks = sum(covers_too_much(cover, spec.pairing, fusion_of(context.claim)) for cover in covers)
    if again:
        decisions = [
            replace(decision, values={**decision.values, "scorer_version": scorer.version}) for decision in decisions
        ]
    return Outputs(scores, [*decisions, *without_target], len(targets), wide_masks)


def _sides_to_score_again(pairs: Sequence[StoredPair], scorer: Scorer) -> list[StoredSample]:
    """The references and bases of the pairs that another version of the scorer selected, each once."""
    ours = (scorer.name, scorer.version)
    others = [pair for pair in pairs if (pair.row.scorer, pair.row.scorer_version) != ours]
    sides = chain.from_iterable(pair.sides for pair in others)
    return list({side.row.id: side for side in sides}.values())


def _require_order(pairs: Sequence[StoredPair], scorer: Scorer, scores: Mapping[str, float]) -> None:
    """Raise ScorerError if, by this version of the scorer, a reference no longer scores more than its base."""
    for pair in pairs:
        row = pair.row
        reference, base = _sides_scores(pair, scores)
        if row.reference_score > row.base_score and reference <= base:
            selected_by = f"{row.scorer} {row.scorer_version}"
            ours = f"{scorer.name} {scorer.version}"
            raise ScorerError(
                f"{row.id} was selected by {selected_by}, but by this worker's {ours} its reference scores no more "
                "than its base: submit the job again"
            )


def _sides_scores(pair: StoredPair, scores: Mapping[str, float]) -> tuple[float, float]:
    """The scores of reference and base: new ones if there are any, otherwise those that selected the pair."""
    reference = scores.get(pair.row.reference_id, pair.row.reference_score)
    return reference, scores.get(pair.row.base_id, pair.row.base_score)


def _without_target(pair: StoredPair) -> Decision:
    reason = pair.row.reason or "fusion is off: the reference is preferred"
    return Decision(pair.row.id, {"adopted": False, "reason": reason})


def _decisions(context: StageContext, fused: Sequence[StoredPair], scores: Mapping[str, float]) -> list[Decision]:
    """Decide on the fused pairs, and store their masks.

    Trajectories are loaded file by file, because all trajectories of a round may not fit into memory.
    """
    decisions = []
    with context.storing_images() as masks:
        for _, group in groupby(fused, key=_target_file):
            pairs = list(group)
            trajectories = context.load_trajectories(chain.from_iterable(pair.samples for pair in pairs))
            for part in batches(pairs, context.bench.settings.batch_size):
                decisions += _decide(context, part, scores, trajectories, masks)
        mask_ids = masks.ids()

    return [
        replace(decision, values={**decision.values, "mask_artifact_id": mask_id})
        for decision, mask_id in zip(decisions, mask_ids, strict=True)
    ]


def _target_file(pair: StoredPair) -> str:
    """The id of the file that holds the target's trajectory."""
    return pair.target.trajectory.id if pair.target is not None and pair.target.trajectory is not None else ""


def _decide(
    context: StageContext,
    pairs: Sequence[StoredPair],
    scores: Mapping[str, float],
    trajectories: Mapping[str, Trajectory],
    masks: ImageWriter,
) -> list[Decision]:
    """The decisions and statistics of a batch of fused pairs. Stores their mask images."""
    config = fusion_of(context.claim)
    pairing = spec_as(context.claim, RoundSpec, FusionJobSpec).pairing

    # 1. the sides with their images, each read once
    samples = {sample.row.id: sample for sample in chain.from_iterable(pair.samples for pair in pairs)}
    images = dict(zip(samples, context.load_images([sample.image for sample in samples.values()]), strict=True))

    def side(sample_id: str, score: float) -> Side:
        latents = trajectory_of(samples[sample_id], trajectories).final[0]
        return Side(latents, images[sample_id], score)

    measured = []
    for pair in pairs:
        row = pair.row
        reference_score, base_score = _sides_scores(pair, scores)
        target_id = row.target_id or ""
        mask = fusion_mask(trajectory_of(pair.reference, trajectories), row.thresholds or (), config)
        reference = side(row.reference_id, reference_score)
        base = side(row.base_id, base_score)
        measured.append(PairSides(reference, base, side(target_id, scores[target_id]), mask))

    # 2. the mask's image, Eq. 7, and the statistics of each pair
    decisions = []
    for pair, sides, statistics in zip(pairs, measured, pair_statistics(measured, context.bench.device), strict=True):
        masks.add(f"mask-{pair.row.number:06d}", mask_image(sides.mask, *sides.base.image.shape[:2]))
        decision = decide(sides.reference, sides.base, sides.target, pairing, sides.mask, config)
        values = {
            **asdict(decision),
            "reference_score": sides.reference.score,
            "base_score": sides.base.score,
            "target_score": sides.target.score,
            "statistics": asdict(statistics),
        }
        decisions.append(Decision(pair.row.id, values))
    return decisions


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert the scores, update the pairs, and end the review if the round has no pairs."""
    results.add_scores(session, outputs.scores)
    results.update_pairs(session, {decision.pair_id: decision.values for decision in outputs.decisions})

    adopted = sum(bool(decision.values["adopted"]) for decision in outputs.decisions)
    message = f"{adopted} of {outputs.targets} targets adopted"
    if outputs.wide_masks:
        limit = spec_as(claim, RoundSpec, FusionJobSpec).pairing.max_mask_cover
        message += f"; {outputs.wide_masks} masks cover more than {limit:g} of the image (pairing.max_mask_cover)"
    statistics = {"adopted": adopted, "wide_masks": outputs.wide_masks}
    jobs.add_event(session, claim.job_id, "round.verified", message, claim.stage_id, **statistics)

    if not results.any_pair(session, claim.job_id, claim.round):
        execution.end_review(session, jobs.get(session, claim.job_id), "there are no pairs to judge")


STAGE = Stage(load, compute, record)
