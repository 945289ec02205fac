"""The round's pairs with their samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from api.core.queries import results
from api.core.tables import Artifact, Pair, Sample
from dfusion.config import FusionConfig
from dfusion.prompts import Prompt
from dfusion.thresholds import thresholds_of
from dfusion.types import Trajectory
from worker.task import Task


@dataclass(frozen=True)
class StoredSample:
    """A sample with where its trajectory is (artifact and row) and its image."""

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


def load_pairs(task: Task, prompts: tuple[int, int] | None = None) -> list[PairSamples]:
    """The round's pairs in order, of all prompts or of a range of them."""
    with task.reading() as session:
        rows = results.round_pairs(session, task.claim.job_id, task.claim.round, prompts)
        samples = results.samples(session, results.sides_of(rows))
        images = results.artifacts(session, [sample.image_artifact_id for sample in samples.values()])
    stored = {
        sample.id: StoredSample(
            sample, sample.trajectory_artifact_id, sample.trajectory_row, images[sample.image_artifact_id]
        )
        for sample in samples.values()
        if sample.trajectory_artifact_id is not None and sample.trajectory_row is not None
    }
    return [
        PairSamples(
            row,
            stored[row.reference_id],
            stored[row.base_id],
            None if row.target_id is None else stored[row.target_id],
        )
        for row in rows
    ]


def trajectory_of(sample: StoredSample, stored: Mapping[str, Trajectory]) -> Trajectory:
    """The sample's own trajectory, of one sample."""
    return stored[sample.trajectory].select([sample.trajectory_row])


def mask_thresholds(prompt: Prompt, reference: Trajectory, config: FusionConfig) -> tuple[float, ...]:
    """The prompt's own thresholds, or those found from the reference's maps, which fusing and verifying both find."""
    return thresholds_of(reference, config) if prompt.thresholds is None else prompt.thresholds
