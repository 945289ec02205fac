"""Parts of plans that several kinds of jobs share: shards of prompts, and the work of what is done to them.

Work is counted in U-Net evaluations: one row through the U-Net is one; guidance takes two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil, floor
from typing import Any

from dfusion.config import FusionConfig, PairingConfig, SamplingConfig, TrainingConfig
from service.plan import PlannedStage, Sizes
from service.states import StageKind

BACKWARD_WORK = 3
"""A training row's forward and backward pass against a forward pass alone."""
_EVALUATED_TOGETHER = 64
"""Images that one evaluation stage makes at least: fewer are not worth a stage of their own."""


def pairs_at_most(pairing: PairingConfig, samples_per_prompt: int) -> int:
    """An upper bound on the pairs of one prompt in one round."""
    references = max(1, floor(pairing.reference_share * samples_per_prompt))
    bases = max(1, floor(pairing.base_share * samples_per_prompt))
    return min(references * pairing.reference_uses, bases)


def sampling_rows(sampling: SamplingConfig) -> int:
    """U-Net evaluations of one image."""
    return sampling.num_steps * _guidance_rows(sampling)


def fusion_rows(fusion: FusionConfig, sampling: SamplingConfig) -> int:
    """U-Net evaluations of one target: itself and its reference in the fused steps, itself after them; an inversion
    takes two more a step."""
    steps = sampling.num_steps
    fused = fusion.steps(steps)
    inversion = 2 * steps if fusion.trajectory == "ddim_inversion" else 0
    return (2 * len(fused) + steps - fused.stop + inversion) * _guidance_rows(sampling)


def rows_per_pair(training: TrainingConfig, sampling: SamplingConfig, update_work: int = 1) -> int:
    """U-Net evaluations that one pair takes at most: both trajectories, once at each step that an inner epoch draws,
    and `update_work` times in the updates."""
    steps = max(1, round(sampling.num_steps * training.timestep_fraction))
    evaluated = min(sampling.num_steps, steps * training.inner_epochs)
    updated = steps * training.inner_epochs
    return 2 * (evaluated + update_work * updated) * _guidance_rows(sampling)


def _guidance_rows(sampling: SamplingConfig) -> int:
    return 1 if sampling.guidance_scale == 1 else 2


def sample_shards(sizes: Sizes, round_number: int, work_per_prompt: int) -> list[PlannedStage]:
    """Sampling stages over all prompts."""
    return _prompt_shards(StageKind.SAMPLE, sizes, round_number, work_per_prompt, ())


def fuse_shards(sizes: Sizes, round_number: int, work_per_prompt: int, needs: tuple[int, ...]) -> list[PlannedStage]:
    """Fusion stages over the pairs of all prompts."""
    return _prompt_shards(StageKind.FUSE, sizes, round_number, work_per_prompt, needs)


def _prompt_shards(
    kind: StageKind, sizes: Sizes, round_number: int, work_per_prompt: int, needs: tuple[int, ...]
) -> list[PlannedStage]:
    return [
        PlannedStage(kind, round_number, (stop - start) * work_per_prompt, shard, {"prompts": [start, stop]}, needs)
        for shard, (start, stop) in enumerate(shards(sizes.prompts, sizes.shard_prompts))
    ]


def evaluation_shards(sizes: Sizes, samples_per_prompt: int) -> Iterator[tuple[dict[str, Any], int]]:
    """What a shard measures on, and its number of prompts."""
    size = max(sizes.shard_prompts, ceil(_EVALUATED_TOGETHER / max(1, samples_per_prompt)))
    for one in sizes.measured:
        for start, stop in shards(one.prompts, size):
            yield {"split": one.split, "set": one.set_id, "prompts": [start, stop]}, stop - start


def shards(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges, `size` each."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def joined(
    first: list[PlannedStage], second: Iterable[PlannedStage], needs: tuple[int, ...] = ()
) -> list[PlannedStage]:
    """Both plans as one; the stages of the second that need nothing need `needs` of the first."""
    offset = len(first)
    moved = [
        PlannedStage(s.kind, s.round, s.work, s.shard, s.params, tuple(n + offset for n in s.needs) or needs)
        for s in second
    ]
    return first + moved


def all_of(plan: list[PlannedStage]) -> tuple[int, ...]:
    """The places of all stages of a plan."""
    return tuple(range(len(plan)))


def last_of(plan: list[PlannedStage]) -> tuple[int, ...]:
    """The place of the last stage of a plan."""
    return (len(plan) - 1,)
