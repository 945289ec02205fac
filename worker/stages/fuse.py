"""Fuse: the targets of some prompts' pairs (Eq. 4, 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from sqlalchemy.orm import Session

from dfusion.config import FusionConfig
from dfusion.errors import InvalidInputError
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.thresholds import thresholds_of
from dfusion.types import Trajectory
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Pair, Sample
from service.ids import IdKind, new_id
from service.states import SampleRole, Split
from worker.context import Record, StageContext, batches
from worker.pairs import PairSamples, fusion_of, load_pairs, trajectory_of

_Stored = Mapping[str, Trajectory]


def run(context: StageContext) -> Record:
    """A target for each pair of the shard that can have one, by the model that its base was sampled from."""
    pairs, config = load_pairs(context), fusion_of(context)
    stored = context.load_trajectories({s.trajectory for pair in pairs for s in (pair.base, pair.reference)})
    found = _thresholds(pairs, stored, config, together="prompts" in context.claim.params)
    ready = [pair for pair in pairs if pair.row.id in found.by_pair]
    thresholds = [found.by_pair[pair.row.id] for pair in ready]
    targets = _targets(context, ready, thresholds, stored, config) if ready else []

    def record(session: Session) -> None:
        context.record_artifacts(session)
        results.add_all(session, targets)
        for pair, target, limits in zip(ready, targets, thresholds, strict=True):
            results.update_pair(session, pair.row.id, {"target_id": target.id, "thresholds": list(limits)})
        for pair_id, why in found.why_not.items():
            results.update_pair(session, pair_id, {"why": f"nothing was fused: {why}"})

    return record


@dataclass(frozen=True)
class _Thresholds:
    """Mask thresholds by pair, and for pairs without why there are none."""

    by_pair: dict[str, Sequence[float]] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)


def _thresholds(pairs: Sequence[PairSamples], stored: _Stored, config: FusionConfig, *, together: bool) -> _Thresholds:
    """The pairs' own, or those of the maps of all samples that are paired on the prompt, which a shard of prompts has
    together; a pair that a request named stands alone, so that what else it named does not matter."""
    found = _Thresholds()
    groups: dict[object, list[PairSamples]] = defaultdict(list)
    for pair in pairs:
        if pair.row.thresholds is not None:
            found.by_pair[pair.row.id] = pair.row.thresholds
        else:
            groups[pair.row.prompt_index if together else pair.row.id].append(pair)
    for members in groups.values():
        sides = {side.row.id: side for pair in members for side in (pair.reference, pair.base)}
        try:
            limits = thresholds_of(Trajectory.cat([trajectory_of(side, stored) for side in sides.values()]), config)
        except InvalidInputError as error:  # an item whose map is the same everywhere
            found.why_not.update((pair.row.id, str(error)) for pair in members)
        else:
            found.by_pair.update((pair.row.id, limits) for pair in members)
    return found


def _targets(
    context: StageContext,
    pairs: Sequence[PairSamples],
    thresholds: Sequence[Sequence[float]],
    stored: _Stored,
    config: FusionConfig,
) -> list[Sample]:
    """The targets as rows, in the order of their pairs; their files are stored."""
    model = context.load_model(*context.model(pairs[0].base.row.model_id))
    size = context.bench.settings.batch_size
    parts = list(zip(batches(pairs, size), batches(thresholds, size), strict=True))
    steps = next(iter(stored.values())).config.num_steps * (2 if config.trajectory == "ddim_inversion" else 1)
    context.heartbeat.plan(len(parts) * steps)
    targets = [_fuse(context, model, part, limits, stored, config) for part, limits in parts]
    images = np.concatenate([model.decode(target.final) for target in targets])
    file = context.store_trajectory("trajectories", Trajectory.cat(targets))
    return [
        _target(context, pair.row, pair.base.row, file, place, context.store_image(f"image-{place:06d}", pixels))
        for place, (pair, pixels) in enumerate(zip(pairs, images, strict=True))
    ]


def _fuse(
    context: StageContext,
    model: DiffusionModel,
    part: Sequence[PairSamples],
    thresholds: Sequence[Sequence[float]],
    stored: _Stored,
    config: FusionConfig,
) -> Trajectory:
    base = Trajectory.cat([trajectory_of(pair.base, stored) for pair in part])
    size = base.latent_size
    return fuse(
        model.unet,
        model.scheduler,
        base,
        Trajectory.cat([trajectory_of(pair.reference, stored) for pair in part]),
        model.encode_prompts([pair.row.prompt for pair in part], size),
        model.encode_prompts([""], size),
        thresholds=thresholds,
        config=config,
        on_step=context.on_step,
    )


def _target(context: StageContext, pair: Pair, base: Sample, file: str, place: int, image: str) -> Sample:
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=context.claim.job_id,
        stage_id=context.claim.stage_id,
        round=context.claim.round,
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
