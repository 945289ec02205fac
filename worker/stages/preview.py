"""Preview: small images of stored trajectories, decoded by the VAE alone, and of the masks of references (Eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sqlalchemy.orm import Session

from dfusion.models import DiffusionModel
from dfusion.previews import MAX_TILES, denoising_strip, mask_grid, preview_steps
from dfusion.types import Trajectory
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Preview
from service.errors import ConflictError
from service.jobs.execution import Claim
from service.jobs.kinds import PreviewJobSpec
from service.jobs.previews import MaskSettings, fusion_of, missing
from worker.context import StageContext
from worker.inputs import StoredModel, StoredSample, load_model, load_samples, spec_as, trajectory_of
from worker.stages.base import Stage


@dataclass(frozen=True)
class Inputs:
    """Inputs of a preview stage.

    Attributes:
        model: The base model of the samples.
        samples: The samples without previews.
        masks: The settings of the masks of those that are references, by sample.
    """

    model: StoredModel
    samples: Sequence[StoredSample]
    masks: Mapping[str, MaskSettings | None]


@dataclass(frozen=True)
class Outputs:
    """Outputs of a preview stage: the previews."""

    previews: Sequence[Preview]


def load(session: Session, claim: Claim) -> Inputs:
    """Load the samples that have no previews yet. Raises ConflictError for a job without a model."""
    model_id = jobs.get(session, claim.job_id).model_id
    if model_id is None:
        raise ConflictError(f"{claim.job_id} has no model that decodes its samples")

    masks = missing(session, spec_as(claim, PreviewJobSpec))
    samples = load_samples(session, results.samples(session, masks).values())
    return Inputs(load_model(session, model_id), list(samples.values()), masks)


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Make the previews of one sample after the other. Raises TrajectoryGoneError."""
    previews = []
    if inputs.samples:
        model = context.load_model(inputs.model)
        context.heartbeat.plan(MAX_TILES * len(inputs.samples))
        for number, sample in enumerate(inputs.samples, 1):
            trajectory = trajectory_of(sample, context.load_trajectories([sample]))
            previews.append(_preview(context, model, sample, trajectory, inputs.masks[sample.row.id]))
            context.heartbeat.at(MAX_TILES * number)  # a short trajectory has fewer tiles
    return Outputs(previews)


def _preview(
    context: StageContext,
    model: DiffusionModel,
    sample: StoredSample,
    trajectory: Trajectory,
    masks: MaskSettings | None,
) -> Preview:
    def decode(latents: torch.Tensor) -> np.ndarray:
        context.heartbeat.step()
        return model.decode(latents)

    # 1. the denoising steps
    num_steps = len(trajectory.timesteps)
    steps = preview_steps(num_steps)
    strip_id = context.store_image(f"strip-{sample.row.id}", denoising_strip(trajectory, steps, decode))

    # 2. the masks of a reference
    mask_id = None
    if masks is not None:
        grid = mask_grid(trajectory, masks["thresholds"], fusion_of(masks), steps)
        mask_id = context.store_image(f"mask-{sample.row.id}", grid)

    return Preview(
        sample_id=sample.row.id,
        job_id=context.claim.job_id,
        num_steps=num_steps,
        steps=list(steps),
        strip_artifact_id=strip_id,
        mask_artifact_id=mask_id,
        mask_settings=masks,
        created_at=now_seconds(),
    )


def record(session: Session, _claim: Claim, outputs: Outputs) -> None:
    """Insert the previews."""
    results.add_all(session, outputs.previews)


STAGE = Stage(load, compute, record)
