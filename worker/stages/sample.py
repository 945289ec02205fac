"""Sample: trajectories and images of a shard of prompts, each from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from sqlalchemy.orm import Session

from dfusion.models import DiffusionModel
from dfusion.optimizer_state import require_optimizer
from dfusion.prompts import Prompt
from dfusion.sampling import sample
from dfusion.seeds import sample_seed
from dfusion.types import Trajectory
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Sample
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import RoundSpec, SamplingJobSpec
from service.states import SampleRole, Split
from worker.context import StageContext
from worker.inputs import StoredModel, load_model_before, load_prompts, shard_range, spec_as
from worker.stages.base import Stage


@dataclass(frozen=True)
class Inputs:
    """Inputs of a sample stage.

    Attributes:
        prompts: All prompts of the job; the shard is a range of them.
        model: The model to sample from.
    """

    prompts: Sequence[Prompt]
    model: StoredModel


@dataclass(frozen=True)
class Outputs:
    """Outputs of a sample stage: the samples of the shard, by prompt and number."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class _PlannedSample:
    """The prompt and the seed of a sample of the shard."""

    prompt_index: int
    prompt: Prompt
    number: int
    seed: int


def load(session: Session, claim: Claim) -> Inputs:
    """Load the job's prompts and the model of its round."""
    return Inputs(load_prompts(session, claim.prompt_set_id), load_model_before(session, claim, claim.round))


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Sample the shard's prompts, with item maps where samples may be fused; store trajectories and images."""
    spec = spec_as(context.claim, RoundSpec, SamplingJobSpec)
    if isinstance(spec, RoundSpec):
        require_optimizer(spec.training)  # before the round samples for hours
    planned = _plan(context.claim, spec, inputs.prompts)
    model = context.load_model(inputs.model)
    sample_batch = partial(_sample, context, spec, model)

    trajectories = []
    with context.storing_images() as images:
        for trajectory, pixels in context.in_batches(planned, sample_batch, spec.sampling.num_steps):
            trajectories.append(trajectory)
            images.add_batch(pixels)
        file_id = context.store_trajectory("trajectories", Trajectory.cat(trajectories))
        image_ids = images.ids()

    samples = []
    for row, (plan, image_id) in enumerate(zip(planned, image_ids, strict=True)):
        samples.append(_sample_row(context.claim, inputs.model, plan, image_id, file_id, row))
    return Outputs(samples)


def _plan(claim: Claim, spec: RoundSpec | SamplingJobSpec, prompts: Sequence[Prompt]) -> list[_PlannedSample]:
    start, stop = shard_range(claim, "prompts")
    samples = []
    for index in range(start, stop):
        prompt = prompts[index]
        for number in range(spec.samples_per_prompt):
            seed = sample_seed(spec.seed, claim.round, index, prompt.text, number)
            samples.append(_PlannedSample(index, prompt, number, seed))
    return samples


def _sample(
    context: StageContext, spec: RoundSpec | SamplingJobSpec, model: DiffusionModel, part: Sequence[_PlannedSample]
) -> tuple[Trajectory, np.ndarray]:
    """The trajectories and images (B, H, W, 3) uint8 of a batch."""
    source = _mask_source(spec)
    items = None
    if source is not None:
        items = [model.item_tokens(image.prompt.text, image.prompt.items) for image in part]

    size = model.latent_size(spec.sampling)
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([image.prompt.text for image in part], size),
        model.encode_prompts([spec.sampling.negative_prompt], size),
        [image.seed for image in part],
        items=items,
        config=spec.sampling,
        on_step=context.on_step,
        mask_source=source or "first_up",
        latent_size=size,
    )
    return trajectory, model.decode(trajectory.final)


def _mask_source(spec: RoundSpec | SamplingJobSpec) -> Literal["first_up", "resolution"] | None:
    """The layers whose item maps are recorded; None if nothing will be fused."""
    if isinstance(spec, SamplingJobSpec):
        return spec.mask_source
    return None if spec.fusion is None else spec.fusion.mask_source


def _sample_row(
    claim: Claim, model: StoredModel, planned: _PlannedSample, image_id: str, file_id: str, row: int
) -> Sample:
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        role=SampleRole.PLAIN,
        split=Split.TRAIN,
        prompt_set_id=claim.prompt_set_id,
        prompt_index=planned.prompt_index,
        prompt=planned.prompt.text,
        number=planned.number,
        seed=planned.seed,
        model_id=model.row.id,
        trajectory_artifact_id=file_id,
        trajectory_row=row,
        image_artifact_id=image_id,
        created_at=now_seconds(),
    )


def record(session: Session, _claim: Claim, outputs: Outputs) -> None:
    """Insert the samples."""
    results.add_all(session, outputs.samples)


STAGE = Stage(load, compute, record)
