"""Parts of plans that several kinds of jobs share: shards of prompts, and the work of stages.

The unit of work is one U-Net evaluation: one row through the U-Net. Guidance needs two per image and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

from dfusion.config import FusionConfig, PairingConfig, SamplingConfig, TrainingConfig
from service.plan import PlannedStage, Sizes, StageTotals
from service.states import StageKind

BACKWARD_WORK = 3
"""The work of a forward and backward pass, relative to a forward pass alone."""
_MIN_EVALUATION_IMAGES = 64
"""Minimum number of images of an evaluation stage, so that its overhead is small."""
_MIN_SCORED_IMAGES = 512
"""Images of one scoring or verifying stage, at least. Scoring takes a fraction of the time of sampling."""
_PAIRS_PER_PROMPT = 4
"""Named pairs of one fusion stage, for each prompt of a sampling stage (`shard_prompts`)."""


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


@dataclass(frozen=True)
class Shards:
    """Stages of one kind that share the prompts or pairs of a job.

    Attributes:
        kind: Their kind.
        unit: What they share: "prompts" or "pairs".
        count: The number of prompts or pairs.
        size: Prompts or pairs of one stage, at most.
        work: The work of one prompt or pair.
    """

    kind: StageKind
    unit: str
    count: int
    size: int
    work: int

    @property
    def totals(self) -> StageTotals:
        """The number of stages and their work."""
        return StageTotals(ceil(self.count / self.size), self.count * self.work)

    def stages(self, round_number: int, needs: tuple[int, ...] = ()) -> list[PlannedStage]:
        """The stages, all with the same dependencies."""
        return [self._stage(round_number, shard, span, needs) for shard, span in self._spans()]

    def stages_after(self, earlier: Shards, first: int, round_number: int) -> list[PlannedStage]:
        """The stages. Each depends on the earlier stages of the same prompts or pairs.

        Args:
            earlier: Stages that share the same prompts or pairs.
            first: The index of the first of them in the plan.
            round_number: The round.
        """
        stages = []
        for shard, (start, stop) in self._spans():
            needs = tuple(range(first + start // earlier.size, first + ceil(stop / earlier.size)))
            stages.append(self._stage(round_number, shard, (start, stop), needs))
        return stages

    def _spans(self) -> Iterator[tuple[int, tuple[int, int]]]:
        return enumerate(shards(self.count, self.size))

    def _stage(self, round_number: int, shard: int, span: tuple[int, int], needs: tuple[int, ...]) -> PlannedStage:
        start, stop = span
        return PlannedStage(
            self.kind, round_number, (stop - start) * self.work, shard, {self.unit: [start, stop]}, needs
        )


def of_prompts(kind: StageKind, sizes: Sizes, work_per_prompt: int) -> Shards:
    """Sampling or fusion stages for all prompts."""
    return Shards(kind, "prompts", sizes.prompts, sizes.shard_prompts, work_per_prompt)


def of_pairs(kind: StageKind, sizes: Sizes, work_per_pair: int) -> Shards:
    """Fusion stages for the pairs that a request names."""
    return Shards(kind, "pairs", sizes.pairs, sizes.shard_prompts * _PAIRS_PER_PROMPT, work_per_pair)


def scoring(kind: StageKind, of: Shards, images: int, work: int) -> Shards:
    """Scoring or verifying stages.

    Args:
        kind: `score` or `verify`.
        of: The stages that make the images.
        images: Images of one prompt or pair that are scored.
        work: The work of one prompt or pair.
    """
    return replace(of, kind=kind, size=max(of.size, ceil(_MIN_SCORED_IMAGES / max(1, images))), work=work)


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


def added(plan: list[PlannedStage], stages: Iterable[PlannedStage]) -> tuple[int, ...]:
    """Append stages to a plan in place, whose dependencies are indices of the plan. Returns their indices."""
    first = len(plan)
    plan += stages
    return tuple(range(first, len(plan)))
