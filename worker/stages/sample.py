"""Sample: the trajectories and images of some prompts, each from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sqlalchemy.orm import Session

from dfusion.models import DiffusionModel
from dfusion.prompts import Prompt
from dfusion.sampling import sample
from dfusion.seeds import sample_seed
from dfusion.types import Trajectory
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Sample
from service.ids import IdKind, new_id
from service.jobs.kinds import RoundSpec, SamplingJobSpec
from service.states import SampleRole, Split
from worker.context import Record, StageContext, batches


@dataclass(frozen=True)
class _Wanted:
    """A sample to be made."""

    prompt_index: int
    prompt: Prompt
    number: int
    seed: int


def run(context: StageContext) -> Record:
    """Trajectories (with item maps where they may be fused) and images of the shard's prompts."""
    spec = context.spec_as(RoundSpec, SamplingJobSpec)
    wanted = _wanted(context, spec)
    row, adapter = context.model_before(context.claim.round)
    model = context.load_model(row, adapter)
    parts = list(batches(wanted, context.bench.settings.batch_size))
    context.heartbeat.plan(len(parts) * spec.sampling.num_steps)
    trajectories, images = [], []
    for part in parts:
        trajectories.append(_sample(context, spec, model, part))
        images.append(model.decode(trajectories[-1].final))
    file = context.store_trajectory("trajectories", Trajectory.cat(trajectories))
    rows = [
        Sample(
            id=new_id(IdKind.SAMPLE),
            job_id=context.claim.job_id,
            stage_id=context.claim.stage_id,
            round=context.claim.round,
            role=SampleRole.PLAIN,
            split=Split.TRAIN,
            prompt_set_id=context.claim.prompt_set_id,
            prompt_index=one.prompt_index,
            prompt=one.prompt.text,
            number=one.number,
            seed=one.seed,
            model_id=row.id,
            trajectory_artifact_id=file,
            trajectory_row=place,
            image_artifact_id=context.store_image(f"image-{place:06d}", pixels),
            created_at=now_seconds(),
        )
        for place, (one, pixels) in enumerate(zip(wanted, np.concatenate(images), strict=True))
    ]

    def record(session: Session) -> None:
        context.record_artifacts(session)
        results.add_all(session, rows)

    return record


def _wanted(context: StageContext, spec: RoundSpec | SamplingJobSpec) -> list[_Wanted]:
    start, stop = context.span("prompts")
    prompts = context.prompts()
    return [
        _Wanted(i, prompts[i], n, sample_seed(spec.seed, context.claim.round, i, prompts[i].text, n))
        for i in range(start, stop)
        for n in range(spec.samples_per_prompt)
    ]


def _sample(
    context: StageContext, spec: RoundSpec | SamplingJobSpec, model: DiffusionModel, part: Sequence[_Wanted]
) -> Trajectory:
    source = _mask_source(spec)
    items = None if source is None else [model.item_tokens(one.prompt.text, one.prompt.items) for one in part]
    size = model.latent_size(spec.sampling)
    return sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([one.prompt.text for one in part], size),
        model.encode_prompts([""], size),
        [one.seed for one in part],
        items=items,
        config=spec.sampling,
        on_step=context.on_step,
        mask_source=source or "first_up",
        latent_size=size,
    )


def _mask_source(spec: RoundSpec | SamplingJobSpec) -> Literal["first_up", "resolution"] | None:
    """Where item maps are recorded; None where nothing will be fused."""
    if isinstance(spec, SamplingJobSpec):
        return spec.mask_source
    return None if spec.fusion is None else spec.fusion.mask_source
