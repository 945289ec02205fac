"""Fuse: the targets of a shard of pairs (Eq. 4, 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

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
from service.db.tables import Sample
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.states import SampleRole, Split
from worker.context import StageContext
from worker.inputs import StoredModel, load_model, trajectory_of
from worker.pairs import StoredPair, fusion_of, load_round_pairs
from worker.stages.base import Stage

_Trajectories = Mapping[str, Trajectory]
"""By the id of their artifact."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a fuse stage.

    Attributes:
        pairs: The pairs of the shard, by number.
        model: The model that sampled their bases; None without pairs.
    """

    pairs: Sequence[StoredPair]
    model: StoredModel | None


@dataclass(frozen=True)
class Target:
    """A fused sample and the thresholds of its masks, one per item."""

    sample: Sample
    thresholds: Sequence[float]


@dataclass(frozen=True)
class Outputs:
    """Outputs of a fuse stage.

    Attributes:
        targets: The targets of the fused pairs, by pair id.
        reasons: The reasons why the other pairs have no target, by pair id.
    """

    targets: Mapping[str, Target]
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class _Thresholds:
    """Mask thresholds by pair id, and the reasons why other pairs have none."""

    by_pair: dict[str, Sequence[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def load(session: Session, claim: Claim) -> Inputs:
    """Load the pairs of the shard and the model of their bases, which is the same for all pairs of a round."""
    pairs = load_round_pairs(session, claim)
    return Inputs(pairs, load_model(session, pairs[0].base.row.model_id) if pairs else None)


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Fuse a target for each pair of the shard that has masks; store trajectories and images."""
    config = fusion_of(context.claim)
    trajectories = context.load_trajectories(chain.from_iterable(pair.sides for pair in inputs.pairs))

    together = "prompts" in context.claim.params
    thresholds = _compute_thresholds(inputs.pairs, trajectories, config, together=together)
    pairs = [pair for pair in inputs.pairs if pair.row.id in thresholds.by_pair]
    # the pairs of a reference together: the U-Net then computes it once for them
    pairs.sort(key=lambda pair: (pair.row.prompt_index, pair.reference.row.number))
    if inputs.model is None or not pairs:
        return Outputs({}, thresholds.reasons)

    limits = [thresholds.by_pair[pair.row.id] for pair in pairs]
    samples = _fuse_pairs(context, context.load_model(inputs.model), pairs, limits, trajectories, config)
    targets = {
        pair.row.id: Target(sample, thresholds.by_pair[pair.row.id])
        for pair, sample in zip(pairs, samples, strict=True)
    }
    return Outputs(targets, thresholds.reasons)


def _compute_thresholds(
    pairs: Sequence[StoredPair], trajectories: _Trajectories, config: FusionConfig, *, together: bool
) -> _Thresholds:
    """The thresholds of the pairs, stored or computed from the maps of several samples.

    Args:
        pairs: The pairs of the shard.
        trajectories: The trajectories of their sides.
        config: The fusion settings.
        together: Whether to compute thresholds from all paired samples of the prompt, which a shard of prompts
            contains completely. Otherwise a pair's thresholds are computed from its own two samples, so they do not
            depend on the other pairs of the request.
    """
    thresholds = _Thresholds()
    groups: dict[object, list[StoredPair]] = defaultdict(list)
    for pair in pairs:
        if pair.row.thresholds is not None:
            thresholds.by_pair[pair.row.id] = pair.row.thresholds
        else:
            groups[pair.row.prompt_index if together else pair.row.id].append(pair)

    for members in groups.values():
        ids = [pair.row.id for pair in members]
        all_sides = chain.from_iterable(pair.sides for pair in members)
        sides = {side.row.id: side for side in all_sides}
        try:
            maps = Trajectory.cat([trajectory_of(side, trajectories) for side in sides.values()])
            limits = thresholds_of(maps, config)
        except InvalidInputError as error:  # an item whose map is constant
            thresholds.reasons.update(dict.fromkeys(ids, str(error)))
        else:
            thresholds.by_pair.update(dict.fromkeys(ids, limits))
    return thresholds


def _fuse_pairs(
    context: StageContext,
    model: DiffusionModel,
    pairs: Sequence[StoredPair],
    thresholds: Sequence[Sequence[float]],
    trajectories: _Trajectories,
    config: FusionConfig,
) -> list[Sample]:
    """Fuse the targets and store their files. Returns their rows in the order of the pairs."""
    num_steps = next(iter(trajectories.values())).config.num_steps
    passes = 2 if config.trajectory == "ddim_inversion" else 1
    fuse_batch = partial(_fuse, context, model, trajectories, config)

    targets = []
    with context.storing_images() as images:
        with_thresholds = list(zip(pairs, thresholds, strict=True))
        for target, pixels in context.in_batches(with_thresholds, fuse_batch, passes * num_steps):
            targets.append(target)
            images.add_batch(pixels)
        file_id = context.store_trajectory("trajectories", Trajectory.cat(targets))
        image_ids = images.ids()

    samples = []
    for row, (pair, image_id) in enumerate(zip(pairs, image_ids, strict=True)):
        samples.append(_sample_row(context.claim, pair, image_id, file_id, row))
    return samples


def _fuse(
    context: StageContext,
    model: DiffusionModel,
    trajectories: _Trajectories,
    config: FusionConfig,
    batch: Sequence[tuple[StoredPair, Sequence[float]]],
) -> tuple[Trajectory, np.ndarray]:
    """The targets of pairs with these thresholds: trajectories and images (B, H, W, 3) uint8."""
    part = [pair for pair, _ in batch]
    base = Trajectory.cat([trajectory_of(pair.base, trajectories) for pair in part])
    size = base.latent_size
    targets = fuse(
        model.unet,
        model.scheduler,
        base,
        Trajectory.cat([trajectory_of(pair.reference, trajectories) for pair in part]),
        model.encode_prompts([pair.row.prompt for pair in part], size),
        model.encode_prompts([base.config.negative_prompt], size),
        thresholds=[thresholds for _, thresholds in batch],
        config=config,
        on_step=context.on_step,
    )
    return targets, model.decode(targets.final)


def _sample_row(claim: Claim, pair: StoredPair, image_id: str, file_id: str, row: int) -> Sample:
    base = pair.base.row
    return Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        role=SampleRole.TARGET,
        split=Split.TRAIN,
        prompt_set_id=pair.row.prompt_set_id,
        prompt_index=pair.row.prompt_index,
        prompt=pair.row.prompt,
        number=base.number,
        seed=base.seed,
        model_id=base.model_id,
        trajectory_artifact_id=file_id,
        trajectory_row=row,
        image_artifact_id=image_id,
        created_at=now_seconds(),
    )


def record(session: Session, _claim: Claim, outputs: Outputs) -> None:
    """Insert the targets, and update each pair with its target or the reason why it has none."""
    results.add_all(session, [target.sample for target in outputs.targets.values()])
    results.update_pairs(
        session,
        {
            pair_id: {"target_id": target.sample.id, "thresholds": list(target.thresholds)}
            for pair_id, target in outputs.targets.items()
        },
    )
    reasons = {pair_id: {"reason": f"nothing was fused: {reason}"} for pair_id, reason in outputs.reasons.items()}
    results.update_pairs(session, reasons)


STAGE = Stage(load, compute, record)
