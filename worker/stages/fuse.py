"""Fuse: the targets of some prompts' pairs (Eq. 4, 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sqlalchemy.orm import Session

from api.core.clock import now_seconds
from api.core.ids import IdKind, new_id
from api.core.queries import results
from api.core.states import SampleRole, Split
from api.core.tables import Pair, Sample
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.types import Trajectory
from worker.pairs import PairSamples, fusion_of, load_pairs, mask_thresholds, trajectory_of
from worker.task import Record, Task, batches
from worker.trajectories import join


def run(task: Task) -> Record:
    """A target for each pair of the shard, by the model that its base was sampled from."""
    pairs = load_pairs(task)
    if not pairs:
        return lambda _session: None
    model = task.load_model(*task.model(pairs[0].base.row.model_id))
    stored = task.load_trajectories({s.trajectory for pair in pairs for s in (pair.base, pair.reference)})
    parts = list(batches(pairs, task.bench.settings.batch_size))
    config = fusion_of(task)
    steps = next(iter(stored.values())).config.num_steps * (2 if config.trajectory == "ddim_inversion" else 1)
    task.heartbeat.plan(len(parts) * steps)
    thresholds = [mask_thresholds(pair.row, trajectory_of(pair.reference, stored), config) for pair in pairs]
    limits = batches(thresholds, task.bench.settings.batch_size)
    targets = [_fuse(task, model, part, of_part, stored) for part, of_part in zip(parts, limits, strict=True)]
    images = np.concatenate([model.decode(target.final) for target in targets])
    file = task.store_trajectory("trajectories", join(targets))
    rows = [
        _target(task, pair.row, pair.base.row, file, place, task.store_image(f"image-{place:06d}", pixels))
        for place, (pair, pixels) in enumerate(zip(pairs, images, strict=True))
    ]

    def record(session: Session) -> None:
        task.record_artifacts(session)
        results.add_all(session, rows)
        for pair, target, limits in zip(pairs, rows, thresholds, strict=True):
            results.update_pair(session, pair.row.id, {"target_id": target.id, "thresholds": list(limits)})

    return record


def _fuse(
    task: Task,
    model: DiffusionModel,
    part: Sequence[PairSamples],
    thresholds: Sequence[Sequence[float]],
    stored: Mapping[str, Trajectory],
) -> Trajectory:
    return fuse(
        model.unet,
        model.scheduler,
        join([trajectory_of(pair.base, stored) for pair in part]),
        join([trajectory_of(pair.reference, stored) for pair in part]),
        model.encode_prompts([pair.row.prompt for pair in part]),
        model.encode_prompts([""]),
        thresholds=thresholds,
        config=fusion_of(task),
        on_step=task.on_step,
    )


def _target(task: Task, pair: Pair, base: Sample, file: str, place: int, image: str) -> Sample:
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=task.claim.job_id,
        stage_id=task.claim.stage_id,
        round=task.claim.round,
        role=SampleRole.TARGET,
        split=Split.TRAIN,
        prompt_set_id=pair.prompt_set_id,
        prompt_index=pair.prompt_index,
        prompt=pair.prompt,
        number=base.number,
        seed=base.seed,
        model_id=base.model_id,
        trajectory_artifact_id=file,
        trajectory_row=place,
        image_artifact_id=image,
        created_at=now_seconds(),
    )
