"""Pairs as loaded by stages, and the samples that a fusion names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from sqlalchemy.orm import Session

from dfusion.config import FusionConfig
from service.db.queries import results
from service.db.tables import Pair, Sample
from service.jobs.execution import Claim
from service.jobs.kinds import FusionJobSpec, RoundSpec
from worker.inputs import SAMPLED_ROLES, StoredSample, load_round_samples, load_samples, range_if_sharded, spec_as


@dataclass(frozen=True)
class StoredPair:
    """A stored pair.

    Attributes:
        row: The pair.
        reference: Its well-aligned sample.
        base: Its poorly-aligned sample.
        target: The sample fused from both; None before fusion or without it.
    """

    row: Pair
    reference: StoredSample
    base: StoredSample
    target: StoredSample | None

    @property
    def sides(self) -> tuple[StoredSample, StoredSample]:
        """The reference and the base."""
        return self.reference, self.base

    @property
    def samples(self) -> list[StoredSample]:
        """The reference, the base, and the target if there is one."""
        return [*self.sides, *([] if self.target is None else [self.target])]


def load_pairs(session: Session, rows: Sequence[Pair]) -> list[StoredPair]:
    """These pairs with their samples, in the same order."""
    samples = load_samples(session, results.samples(session, results.sides_of(rows)).values())
    return [
        StoredPair(
            row,
            samples[row.reference_id],
            samples[row.base_id],
            None if row.target_id is None else samples[row.target_id],
        )
        for row in rows
    ]


def load_round_pairs(session: Session, claim: Claim) -> list[StoredPair]:
    """The pairs of the claim's round, or of its shard if the stage has one, by number."""
    prompts = range_if_sharded(claim, "prompts")
    numbers = range_if_sharded(claim, "pairs")
    return load_pairs(session, results.round_pairs(session, claim.job_id, claim.round, prompts, numbers))


def load_sides_to_fuse(session: Session, spec: FusionJobSpec) -> list[tuple[Sample, Sample]]:
    """The (reference, base) samples that the spec names; empty if the spec pairs a sampling."""
    if spec.pair is not None:
        pair = results.get_pair(session, spec.pair)
        ids = [(pair.reference_id, pair.base_id)]
    else:
        ids = [(sides.reference, sides.base) for sides in spec.pairs or ()]

    samples = results.samples(session, set(chain.from_iterable(ids)))
    return [(samples[reference_id], samples[base_id]) for reference_id, base_id in ids]


def load_samples_to_fuse(session: Session, claim: Claim, spec: FusionJobSpec) -> list[StoredSample]:
    """The samples of the claim's shard that may become a side of a pair, each once; of all shards if it has none.

    A sample of several named pairs belongs to the shard of the first one.
    """
    if spec.sampling is not None:
        return load_round_samples(session, spec.sampling, 0, SAMPLED_ROLES, range_if_sharded(claim, "prompts"))

    sides = load_sides_to_fuse(session, spec)
    start, stop = range_if_sharded(claim, "pairs") or (0, len(sides))
    earlier = {sample.id for sample in chain.from_iterable(sides[:start])}
    own = chain.from_iterable(sides[start:stop])
    samples = {sample.id: sample for sample in own if sample.id not in earlier}
    return list(load_samples(session, samples.values()).values())


def fusion_of(claim: Claim) -> FusionConfig:
    """The fusion settings of the claim's job."""
    return spec_as(claim, RoundSpec, FusionJobSpec).fusion or FusionConfig()
