"""The round's pairs with their samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dfusion.config import FusionConfig
from dfusion.types import Trajectory
from service.db.queries import results
from service.db.tables import Artifact, Pair, Sample
from service.errors import TrajectoryGoneError
from service.jobs.kinds import FusionJobSpec, RoundSpec
from worker.context import StageContext


@dataclass(frozen=True)
class StoredSample:
    """A sample with its image and where its trajectory is: artifact and row, empty where it is not kept."""

    row: Sample
    trajectory: str
    trajectory_row: int
    image: Artifact


@dataclass(frozen=True)
class PairSamples:
    """A pair with its samples; `target` is None before fusion, or without it."""

    row: Pair
    reference: StoredSample
    base: StoredSample
    target: StoredSample | None


def load_pairs(context: StageContext) -> list[PairSamples]:
    """The round's pairs in order: all of them, or the shard's where the stage is one."""
    spans = {of: context.span(of) for of in ("prompts", "pairs") if of in context.claim.params}
    with context.reading() as session:
        rows = results.round_pairs(
            session, context.claim.job_id, context.claim.round, spans.get("prompts"), spans.get("pairs")
        )
    return with_samples(context, rows)


def with_samples(context: StageContext, rows: Sequence[Pair]) -> list[PairSamples]:
    """These pairs with their samples."""
    with context.reading() as session:
        samples = results.samples(session, results.sides_of(rows))
    stored = stored_samples(context, samples.values())
    return [
        PairSamples(
            row,
            stored[row.reference_id],
            stored[row.base_id],
            None if row.target_id is None else stored[row.target_id],
        )
        for row in rows
    ]


def stored_samples(context: StageContext, samples: Collection[Sample]) -> dict[str, StoredSample]:
    """The samples with their images, by id."""
    with context.reading() as session:
        images = results.artifacts(session, [sample.image_artifact_id for sample in samples])
    return {
        sample.id: StoredSample(
            sample, sample.trajectory_artifact_id or "", sample.trajectory_row or 0, images[sample.image_artifact_id]
        )
        for sample in samples
    }


def trajectory_of(sample: StoredSample, stored: Mapping[str, Trajectory]) -> Trajectory:
    """The sample's own trajectory, of one sample. Raises TrajectoryGoneError where it is not kept any more."""
    if sample.trajectory not in stored:
        raise TrajectoryGoneError(f"the trajectory of {sample.row.id} is not kept (DFUSION_KEEP_TRAJECTORIES)")
    return stored[sample.trajectory].select([sample.trajectory_row])


def fusion_of(context: StageContext) -> FusionConfig:
    """How the job's targets are fused."""
    return context.spec_as(RoundSpec, FusionJobSpec).fusion or FusionConfig()
