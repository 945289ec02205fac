"""Models, prompts and samples as loaded by stages: rows with the artifacts of their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from sqlalchemy.orm import Session

from dfusion.prompts import Prompt
from dfusion.types import Trajectory
from service.db.queries import jobs, prompt_sets, results
from service.db.tables import Artifact, Model, Sample
from service.errors import ConflictError, TrajectoryGoneError
from service.jobs.execution import Claim
from service.states import SampleRole

S = TypeVar("S")
S2 = TypeVar("S2")

SAMPLED_ROLES = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)
"""Roles of the samples that the policy sampled for training: neither fused nor sampled for an evaluation."""


@overload
def spec_as(claim: Claim, first: type[S]) -> S: ...


@overload
def spec_as(claim: Claim, first: type[S], second: type[S2]) -> S | S2: ...


def spec_as(claim: Claim, first: type[Any], second: type[Any] | None = None) -> Any:
    """The spec of the claim's job, which must have one of these types. Raises ConflictError."""
    if isinstance(claim.spec, (first, second or first)):
        return claim.spec
    raise ConflictError(f"expected a job with a {claim.kind} stage, got a {type(claim.spec).__name__}")


def range_if_sharded(claim: Claim, name: str) -> tuple[int, int] | None:
    """The range of the claim's shard; None if the stage has all items."""
    return shard_range(claim, name) if name in claim.params else None


def shard_range(claim: Claim, name: str) -> tuple[int, int]:
    """The range of the claim's shard.

    Args:
        claim: The stage under lease.
        name: The items of the shard: "prompts" or "pairs".

    Returns:
        The first index, and the index after the last.
    """
    start, stop = claim.params[name]
    return int(start), int(stop)


def load_prompts(session: Session, set_id: str | None) -> tuple[Prompt, ...]:
    """All prompts of a set; empty if the set does not exist."""
    row = None if set_id is None else prompt_sets.by_id(session, set_id)
    return () if row is None else prompt_sets.prompts_of(row)


@dataclass(frozen=True)
class StoredModel:
    """A stored model.

    Attributes:
        row: The model.
        adapter: The file of its LoRA adapter; None for a base model.
    """

    row: Model
    adapter: Artifact | None


def load_model(session: Session, model_id: str) -> StoredModel:
    """The model with this id. Raises NotFoundError."""
    return _with_adapter(session, results.get_model(session, model_id))


def load_model_before(session: Session, claim: Claim, round_number: int) -> StoredModel:
    """The model that a round of the claim's job samples from. Raises NotFoundError."""
    job = jobs.get(session, claim.job_id)
    return _with_adapter(session, results.model_before(session, job, round_number))


def _with_adapter(session: Session, row: Model) -> StoredModel:
    adapter_id = row.adapter_artifact_id
    return StoredModel(row, None if adapter_id is None else results.get_artifact(session, adapter_id))


@dataclass(frozen=True)
class StoredSample:
    """A stored sample.

    Attributes:
        row: The sample.
        image: The file of its image.
        trajectory: The file that holds its trajectory, at `row.trajectory_row`; None if it was not kept.
    """

    row: Sample
    image: Artifact
    trajectory: Artifact | None


def load_samples(session: Session, rows: Iterable[Sample]) -> dict[str, StoredSample]:
    """These samples with their files, by id."""
    rows = list(rows)
    files = {row.image_artifact_id for row in rows}
    files |= {row.trajectory_artifact_id for row in rows if row.trajectory_artifact_id is not None}
    artifacts = results.artifacts(session, files)

    return {
        row.id: StoredSample(row, artifacts[row.image_artifact_id], artifacts.get(row.trajectory_artifact_id or ""))
        for row in rows
    }


def load_round_samples(
    session: Session,
    job_id: str,
    round_number: int,
    roles: Sequence[SampleRole],
    prompts: tuple[int, int] | None = None,
) -> list[StoredSample]:
    """A round's samples of these roles, or those of a range of prompts, by prompt and number."""
    rows = results.round_samples(session, job_id, round_number, roles, prompts)
    return list(load_samples(session, rows).values())


def trajectory_of(sample: StoredSample, trajectories: Mapping[str, Trajectory]) -> Trajectory:
    """A sample's own trajectory, B = 1.

    Args:
        sample: The sample.
        trajectories: Loaded trajectories by the id of their artifact (`StageContext.load_trajectories`).

    Raises:
        TrajectoryGoneError: The trajectory is no longer stored.
    """
    return trajectories[trajectory_file(sample).id].select([sample.row.trajectory_row or 0])


def trajectory_file(sample: StoredSample) -> Artifact:
    """The file of a sample's trajectory. Raises TrajectoryGoneError if it is no longer stored."""
    if sample.trajectory is None:
        raise TrajectoryGoneError(f"the trajectory of {sample.row.id} is not stored (DFUSION_KEEP_TRAJECTORIES)")
    return sample.trajectory
