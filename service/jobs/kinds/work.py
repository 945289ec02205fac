"""Parts of plans that several kinds of jobs share: shards of prompts, and the work of stages.

The unit of work is one U-Net evaluation: one row through the U-Net. Guidance needs two per image and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import ceil, floor
from typing import Any

from dfusion.config import FusionConfig, PairingConfig, SamplingConfig, TrainingConfig
from service.plan import PlannedStage, Sizes, StageTotals
from service.states import StageKind

BACKWARD_WORK = 3
"""The work of a forward and backward pass, relative to a forward pass alone."""
_MIN_EVALUATION_IMAGES = 64
"""Images that one evaluation stage makes at least, so that its overhead is small."""


def pairs_at_most(pairing: PairingConfig, samples_per_prompt: int) -> int:
    """An upper bound on the pairs of one prompt in one round."""
    references = max(1, floor(pairing.reference_share * samples_per_prompt))
    bases = max(1, floor(pairing.base_share * samples_per_prompt))
    return min(references * pairing.reference_uses, bases)


def sampling_rows(sampling: SamplingConfig) -> int:
    """U-Net evaluations of one image."""
    return sampling.num_steps * _guidance_rows(sampling)


def fusion_rows(fusion: FusionConfig, sampling: SamplingConfig) -> int:
    """U-Net evaluations of one target.

    A fused step evaluates the target and its reference, a later step the target. DDIM inversion adds two per step.
    """
    steps = sampling.num_steps
    fused = fusion.steps(steps)
    inversion = 2 * steps if fusion.trajectory == "ddim_inversion" else 0
    return (2 * len(fused) + steps - fused.stop + inversion) * _guidance_rows(sampling)


def rows_per_pair(training: TrainingConfig, sampling: SamplingConfig, update_work: int = 1) -> int:
    """U-Net evaluations of training on one pair, at most.

    For both trajectories, the old log-prob of each drawn step is evaluated once; each update counts `update_work`.
    """
    steps = max(1, round(sampling.num_steps * training.timestep_fraction))
    evaluated = min(sampling.num_steps, steps * training.inner_epochs)
    updated = steps * training.inner_epochs
    return 2 * (evaluated + update_work * updated) * _guidance_rows(sampling)


def _guidance_rows(sampling: SamplingConfig) -> int:
    return 1 if sampling.guidance_scale == 1 else 2


def sample_shards(sizes: Sizes, round_number: int, work_per_prompt: int) -> list[PlannedStage]:
    """Sampling stages for all prompts."""
    return _prompt_shards(StageKind.SAMPLE, sizes, round_number, work_per_prompt, ())


def fuse_shards(sizes: Sizes, round_number: int, work_per_prompt: int, needs: tuple[int, ...]) -> list[PlannedStage]:
    """Fusion stages for the pairs of all prompts."""
    return _prompt_shards(StageKind.FUSE, sizes, round_number, work_per_prompt, needs)


def _prompt_shards(
    kind: StageKind, sizes: Sizes, round_number: int, work_per_prompt: int, needs: tuple[int, ...]
) -> list[PlannedStage]:
    return [
        PlannedStage(kind, round_number, (stop - start) * work_per_prompt, shard, {"prompts": [start, stop]}, needs)
        for shard, (start, stop) in enumerate(shards(sizes.prompts, sizes.shard_prompts))
    ]


def evaluation_shards(sizes: Sizes, samples_per_prompt: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The params of each evaluation shard, and its number of prompts."""
    size = _evaluation_shard_size(sizes, samples_per_prompt)
    for prompt_set in sizes.measured:
        for start, stop in shards(prompt_set.prompts, size):
            yield {"split": prompt_set.split, "set": prompt_set.set_id, "prompts": [start, stop]}, stop - start


def evaluation_totals(sizes: Sizes, samples_per_prompt: int, image_work: int) -> StageTotals:
    """The evaluation shards of one model."""
    size = _evaluation_shard_size(sizes, samples_per_prompt)
    count = sum(ceil(prompt_set.prompts / size) for prompt_set in sizes.measured)
    return StageTotals(count, sizes.measured_prompts * samples_per_prompt * image_work)


def _evaluation_shard_size(sizes: Sizes, samples_per_prompt: int) -> int:
    return max(sizes.shard_prompts, ceil(_MIN_EVALUATION_IMAGES / max(1, samples_per_prompt)))


def prompt_totals(sizes: Sizes, work_per_prompt: int) -> StageTotals:
    """The sampling or fusion stages of one round."""
    return StageTotals(ceil(sizes.prompts / sizes.shard_prompts), sizes.prompts * work_per_prompt)


def times(count: int, totals: StageTotals) -> StageTotals:
    """These stages, repeated."""
    return StageTotals(count * totals.count, count * totals.work)


def shards(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def joined(
    first: list[PlannedStage], second: Iterable[PlannedStage], needs: tuple[int, ...] = ()
) -> list[PlannedStage]:
    """Append a plan to another.

    Args:
        first: The first plan.
        second: The second plan.
        needs: Dependencies, as indices in `first`, for the stages of `second` that have none.
    """
    offset = len(first)
    plan = list(first)
    for stage in second:
        shifted = tuple(index + offset for index in stage.needs)
        plan.append(replace(stage, needs=shifted or needs))
    return plan


def all_of(plan: list[PlannedStage]) -> tuple[int, ...]:
    """The indices of all stages of a plan."""
    return tuple(range(len(plan)))


def last_of(plan: list[PlannedStage]) -> tuple[int, ...]:
    """The index of the last stage of a plan."""
    return (len(plan) - 1,)
