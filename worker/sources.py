"""What a fusion or a training that stands alone works on: stored samples and pairs that its spec names."""

from __future__ import annotations

from sqlalchemy.orm import Session

from service.db.queries import results
from service.db.tables import Pair, Sample
from service.jobs.kinds import FusionJobSpec, TrainingJobSpec
from service.states import SampleRole, Verdict

_DRAWN = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)


def sides_to_fuse(session: Session, spec: FusionJobSpec) -> list[tuple[Sample, Sample]]:
    """The (reference, base) pairs that the spec names; none where it has a sampling paired."""
    if spec.pair is not None:
        pair = results.get_pair(session, spec.pair)
        ids = [(pair.reference_id, pair.base_id)]
    else:
        ids = [(side.reference, side.base) for side in spec.pairs or ()]
    rows = results.samples(session, {sample_id for pair_ids in ids for sample_id in pair_ids})
    return [(rows[reference], rows[base]) for reference, base in ids]


def samples_to_fuse(session: Session, spec: FusionJobSpec) -> list[Sample]:
    """All samples that may become a side of a pair, each once."""
    if spec.sampling is not None:
        return [sample for sample, _ in results.round_images(session, spec.sampling, 0, _DRAWN)]
    found = {sample.id: sample for sides in sides_to_fuse(session, spec) for sample in sides}
    return list(found.values())


def pairs_to_train_on(session: Session, spec: TrainingJobSpec) -> list[Pair]:
    """The pairs that the spec names; with `prefer` "verdicts" those that a person prefers a side of."""
    found = results.pairs(session, spec.pairs or ())
    for job_id in spec.jobs or ():
        found += results.job_pairs(session, job_id)
    if spec.prefer == "verdicts":
        return [pair for pair in found if pair.verdict in (Verdict.TARGET, Verdict.BASE)]
    return found
