"""Conversion of pairs and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from api.converters.common import artifact_path, utc
from api.wire.pairs import AgreementOut, PairOut, ReviewerOut, SideOut, VerdictOut
from service.db.queries.agreement import Agreement
from service.db.tables import Pair, PairVerdict, Sample
from service.states import Verdict


def _combined(row: Pair) -> VerdictOut | None:
    if row.verdict is None or row.verdict_at is None:
        return None
    return VerdictOut(prefer=Verdict(row.verdict), reviewer=row.verdict_by or None, created_at=utc(row.verdict_at))


def _verdicts(rows: Sequence[PairVerdict]) -> list[VerdictOut]:
    return [
        VerdictOut(prefer=Verdict(row.prefer), reviewer=row.reviewer or None, created_at=utc(row.created_at))
        for row in rows
        if row.prefer is not None
    ]


def pair_out(row: Pair, samples: Mapping[str, Sample], verdicts: Mapping[str, Sequence[PairVerdict]]) -> PairOut:
    """Convert a pair. `samples` has its sides by id, and `verdicts` the verdicts by pair."""
    return PairOut(
        id=row.id,
        job=row.job_id,
        round=row.round,
        number=row.number,
        prompt=row.prompt,
        prompt_index=row.prompt_index,
        adopted=row.adopted,
        reason=row.reason,
        verdict=_combined(row),
        verdicts=_verdicts(verdicts[row.id]),
        revision=row.revision,
        scorer=row.scorer,
        scorer_version=row.scorer_version,
        thresholds=row.thresholds,
        reference=_side(samples[row.reference_id], row.reference_score),
        base=_side(samples[row.base_id], row.base_score),
        target=None if row.target_id is None else _side(samples[row.target_id], row.target_score),
        statistics=row.statistics,
        mask=artifact_path(row.mask_artifact_id),
        created_at=utc(row.created_at),
        links={"self": f"/pairs/{row.id}", "job": f"/jobs/{row.job_id}"},
    )


def _side(row: Sample, score: float | None) -> SideOut:
    image = f"/artifacts/{row.image_artifact_id}"
    return SideOut(id=row.id, seed=row.seed, score=score, image=image, href=f"/samples/{row.id}")


def agreement_out(measured: Agreement, with_gold: bool) -> AgreementOut:
    """Convert an agreement, with the accuracy on gold pairs or without it."""
    reviewers = [
        ReviewerOut(
            reviewer=row.reviewer or None,
            judged=row.judged,
            gold_judged=row.gold_judged if with_gold else None,
            gold_right=row.gold_right if with_gold else None,
        )
        for row in measured.reviewers
    ]
    return AgreementOut(
        pairs=measured.pairs,
        compared=measured.compared,
        verdicts=measured.verdicts,
        alpha=measured.alpha,
        reviewers=reviewers,
    )
