"""Select: references and bases, prompt by prompt, or as a fusion names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from sqlalchemy.orm import Session

from dfusion.config import PairingConfig
from dfusion.pairing import choose_pairs
from dfusion.rewards import Scorer
from service.db.clock import now_seconds
from service.db.queries import jobs, prompt_sets, results
from service.db.tables import Pair, Sample
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.kinds import FusionJobSpec, RoundSpec
from service.states import SampleRole
from worker.context import Record, StageContext
from worker.scoring import scores_by
from worker.sources import samples_to_fuse, sides_to_fuse

_Sides = tuple[Sample, Sample]
_Thresholds = Mapping[tuple[str | None, int], Sequence[float] | None]
"""By prompt set and place in it: the same text may stand in several places, with other items."""


def run(context: StageContext) -> Record:
    """The pairs, and the roles of their samples."""
    match context.spec:
        case RoundSpec() as spec:
            with context.reading() as session:
                found = results.round_images(session, context.claim.job_id, context.claim.round, [SampleRole.PLAIN])
                samples = [sample for sample, _ in found]
                thresholds = _thresholds(session, samples)
            named: list[_Sides] = []
        case FusionJobSpec() as spec:
            with context.reading() as session:
                samples = samples_to_fuse(session, spec)
                named = sides_to_fuse(session, spec)
                thresholds = _thresholds(session, samples)
                own = results.get_pair(session, spec.pair).thresholds if spec.pair else None
            if spec.thresholds or own:
                thresholds = dict.fromkeys(thresholds, spec.thresholds or own)
        case other:
            raise ConflictError(f"nothing is paired for a {type(other).__name__}")
    scorer = context.bench.scorer(spec.reward or "")
    known = scores_by(context, scorer, samples)
    sides = named or _choose(samples, known.by_sample, spec.pairing)
    pairs = [_pair(context, number, *one, scorer, known.by_sample, thresholds) for number, one in enumerate(sides)]

    def record(session: Session) -> None:
        results.add_scores(session, known.found)
        results.add_all(session, pairs)
        results.mark_paired(session, context.claim.job_id, context.claim.round)
        message = f"{len(pairs)} pairs from {len(samples)} samples"
        jobs.add_event(
            session, context.claim.job_id, "round.paired", message, context.claim.stage_id, round=context.claim.round
        )

    return record


def _choose(samples: Iterable[Sample], scores: Mapping[str, float], pairing: PairingConfig) -> list[_Sides]:
    sides = []
    for _, group in groupby(samples, key=lambda sample: sample.prompt_index):
        members = list(group)
        chosen = choose_pairs([scores[sample.id] for sample in members], pairing)
        sides += [(members[one.reference], members[one.base]) for one in chosen]
    return sides


def _thresholds(session: Session, samples: Iterable[Sample]) -> _Thresholds:
    """Those of the prompts that the samples were made on."""
    found: dict[tuple[str | None, int], Sequence[float] | None] = {}
    for set_id in {sample.prompt_set_id for sample in samples}:
        row = None if set_id is None else prompt_sets.by_id(session, set_id)
        prompts = () if row is None else prompt_sets.prompts_of(row)
        found |= {(set_id, place): prompt.thresholds for place, prompt in enumerate(prompts)}
    return found


def _pair(
    context: StageContext,
    number: int,
    reference: Sample,
    base: Sample,
    scorer: Scorer,
    scores: Mapping[str, float],
    thresholds: _Thresholds,
) -> Pair:
    own = thresholds.get((reference.prompt_set_id, reference.prompt_index))
    return Pair(
        id=new_id(IdKind.PAIR),
        job_id=context.claim.job_id,
        stage_id=context.claim.stage_id,
        round=context.claim.round,
        number=number,
        prompt_set_id=base.prompt_set_id,
        prompt_index=base.prompt_index,
        prompt=base.prompt,
        reference_id=reference.id,
        base_id=base.id,
        scorer=scorer.name,
        scorer_version=scorer.version,
        reference_score=scores[reference.id],
        base_score=scores[base.id],
        thresholds=None if own is None else list(own),
        figures={},
        created_at=now_seconds(),
    )
