"""Verify: score the targets, adopt them by Eq. 7, and measure each pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from sqlalchemy.orm import Session

from dfusion.errors import ScorerError
from dfusion.figures import Side, covers_too_much, decide, fusion_mask, mask_image, pair_figures
from dfusion.types import Trajectory
from service.db.queries import jobs, results
from service.jobs import execution
from service.jobs.kinds import FusionJobSpec, RoundSpec
from worker.context import Record, StageContext
from worker.pairs import PairSamples, StoredSample, fusion_of, load_pairs, trajectory_of
from worker.scoring import score_images, score_rows


@dataclass(frozen=True)
class _Verdict:
    """What is written into a pair."""

    pair_id: str
    values: dict[str, Any]


def run(context: StageContext) -> Record:
    """Decisions and figures of the round's pairs."""
    pairs = load_pairs(context)
    fused = [pair for pair in pairs if pair.target is not None]
    targets = [pair.target for pair in fused if pair.target is not None]
    spec = context.spec_as(RoundSpec, FusionJobSpec)
    scorer = context.bench.scorer(spec.reward or "")
    for pair in pairs:
        if (pair.row.scorer, pair.row.scorer_version) != (scorer.name, scorer.version):
            chosen, ours = f"{pair.row.scorer} {pair.row.scorer_version}", f"{scorer.name} {scorer.version}"
            raise ScorerError(f"{pair.row.id} was chosen by {chosen}, this worker has {ours}: ask for the job again")
    scored = score_images(context, [scorer], [t.image for t in targets], [t.row.prompt for t in targets])
    rows = score_rows([scorer], [target.row.id for target in targets], scored.values)
    scores = {row.sample_id: row.value for row in rows}
    verdicts = [*_verdicts(context, fused, scores), *(_naive(pair) for pair in pairs if pair.target is None)]
    limit = spec.pairing.max_mask_cover
    covers = [verdict.values["figures"]["mask_cover"] for verdict in verdicts if "figures" in verdict.values]
    wide = sum(covers_too_much(cover, spec.pairing, fusion_of(context)) for cover in covers)

    def record(session: Session) -> None:
        context.record_artifacts(session)
        results.add_all(session, rows)
        for verdict in verdicts:
            results.update_pair(session, verdict.pair_id, verdict.values)
        adopted = sum(bool(verdict.values["adopted"]) for verdict in verdicts)
        message = f"{adopted} of {len(fused)} targets adopted"
        if wide:
            message += f"; {wide} masks cover more than {limit:g} of the image (pairing.max_mask_cover)"
        figures = {"adopted": adopted, "wide_masks": wide}
        jobs.add_event(session, context.claim.job_id, "round.verified", message, context.claim.stage_id, **figures)
        if not pairs:
            execution.end_review(session, jobs.get(session, context.claim.job_id), "there is no pair to judge")

    return record


def _naive(pair: PairSamples) -> _Verdict:
    why = pair.row.why or "fusion is off: the reference is preferred"
    return _Verdict(pair.row.id, {"adopted": False, "why": why})


def _verdicts(context: StageContext, pairs: list[PairSamples], scores: dict[str, float]) -> Iterator[_Verdict]:
    """Trajectories are loaded file by file: all of a round's need not fit into memory."""
    for _, group in groupby(pairs, key=lambda pair: pair.target.trajectory if pair.target else ""):
        members = list(group)
        sides = [side for pair in members for side in (pair.reference, pair.base, pair.target) if side]
        stored = context.load_trajectories({side.trajectory for side in sides})
        for pair in members:
            if pair.target is not None:
                yield _verdict(context, pair, pair.target, scores[pair.target.row.id], stored)


def _verdict(
    context: StageContext,
    pair: PairSamples,
    fused: StoredSample,
    score: float,
    stored: Mapping[str, Trajectory],
) -> _Verdict:
    """Decision, figures and mask image of one fused pair."""

    def side(sample: StoredSample, value: float) -> Side:
        return Side(trajectory_of(sample, stored).final[0], context.load_image(sample.image), value)

    fused_from, config = trajectory_of(pair.reference, stored), fusion_of(context)
    mask = fusion_mask(fused_from, pair.row.thresholds or (), config)
    reference, base = side(pair.reference, pair.row.reference_score), side(pair.base, pair.row.base_score)
    target = side(fused, score)
    height, width = target.image.shape[:2]
    image = context.store_image(f"mask-{pair.row.number:06d}", mask_image(mask, height, width))
    decision = decide(reference, base, target, context.spec_as(RoundSpec, FusionJobSpec).pairing, mask, config)
    figures = asdict(pair_figures(reference, base, target, mask))
    found = {**asdict(decision), "target_score": target.score, "figures": figures, "mask_artifact_id": image}
    return _Verdict(pair.row.id, found)
