"""From a spec to stages: what a job consists of, what waits for what, and how much work each stage is.

The stages of a round are planned together; the next round is planned in the transaction that ends a round's
training, so a later decision (people's verdicts, an early stop) can come between two rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import ceil, floor
from typing import Any

from dfusion.config import FusionConfig, PairingConfig, SamplingConfig, TrainingConfig
from service.jobs.specs import (
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    JobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from service.plan import Counts, PlannedStage, PromptsToMeasure, Sizes
from service.states import Split, StageKind

_BACKWARD_WORK = 3
"""A training row's forward and backward pass against a forward pass alone."""
_EVALUATED_TOGETHER = 64
"""Images that one evaluation stage makes at least: fewer are not worth a stage of their own."""


def pairs_at_most(pairing: PairingConfig, samples_per_prompt: int) -> int:
    """An upper bound on the pairs of one prompt in one round."""
    references = max(1, floor(pairing.reference_share * samples_per_prompt))
    bases = max(1, floor(pairing.base_share * samples_per_prompt))
    return min(references * pairing.reference_uses, bases)


def evaluated_rounds(spec: RoundSpec) -> tuple[int, ...]:
    """The rounds after which the model is measured; 0 is before the first."""
    if spec.evaluation is None:
        return ()
    return tuple(range(spec.rounds + 1)) if spec.evaluation.every_round else (0, spec.rounds)


def count(spec: JobSpec, sizes: Sizes) -> Counts:
    """What the whole job takes."""
    match spec:
        case RoundSpec():
            return _count_rounds(spec, sizes)
        case SamplingJobSpec():
            images = sizes.prompts * spec.samples_per_prompt
            return Counts(sampled=images, sampling=images * _sampling_rows(spec.sampling))
        case FusionJobSpec():
            pairs = _fusion_pairs(spec, sizes)
            return Counts(fused_at_most=pairs, fusion_at_most=pairs * _fusion_rows(spec.fusion, sizes.sampling))
        case TrainingJobSpec():
            return Counts(training_at_most=sizes.pairs * _rows_per_pair(spec.training, sizes.sampling))
        case EvaluationJobSpec():
            images = len(sizes.models) * sizes.measured_prompts * spec.samples_per_prompt
            return Counts(evaluated=images, evaluation=images * _sampling_rows(spec.sampling))
        case ExportJobSpec():
            return Counts()


def _count_rounds(spec: RoundSpec, sizes: Sizes) -> Counts:
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt) * sizes.prompts * spec.rounds
    per_evaluation = 0 if spec.evaluation is None else spec.evaluation.samples_per_prompt
    evaluated = sizes.measured_prompts * per_evaluation * len(evaluated_rounds(spec))
    sampled = sizes.prompts * spec.samples_per_prompt * spec.rounds
    return Counts(
        sampled=sampled,
        fused_at_most=0 if spec.fusion is None else pairs,
        evaluated=evaluated,
        sampling=sampled * _sampling_rows(spec.sampling),
        fusion_at_most=0 if spec.fusion is None else pairs * _fusion_rows(spec.fusion, spec.sampling),
        training_at_most=spec.rounds * _training_rows(spec, sizes.prompts),
        evaluation=evaluated * _sampling_rows(spec.sampling),
    )


def plan_start(spec: JobSpec, sizes: Sizes) -> list[PlannedStage]:
    """The job's first stages: all of them, but for rounds only those up to the first round's end."""
    match spec:
        case RoundSpec():
            first = _evaluation(spec, 0, sizes) if evaluated_rounds(spec) else []
            return _joined(first, plan_round(spec, 1, sizes))
        case SamplingJobSpec():
            plan = _sample_shards(sizes, 0, spec.samples_per_prompt * _sampling_rows(spec.sampling))
            images = sizes.prompts * spec.samples_per_prompt
            return [*plan, PlannedStage(StageKind.SCORE, 0, images, needs=_all(plan))]
        case FusionJobSpec():
            return _plan_fusion(spec, sizes)
        case TrainingJobSpec():
            work = sizes.pairs * _rows_per_pair(spec.training, sizes.sampling, _BACKWARD_WORK)
            return [PlannedStage(StageKind.TRAIN, 1, work)]
        case EvaluationJobSpec():
            return _plan_evaluation(spec, sizes)
        case ExportJobSpec():
            return [PlannedStage(StageKind.EXPORT, 0, 1)]


def plan_round(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The stages of one round: sample shards, score, select, fuse shards, verify, (review,) train, evaluate."""
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt)
    plan = _sample_shards(sizes, round_number, spec.samples_per_prompt * _sampling_rows(spec.sampling))
    images = sizes.prompts * spec.samples_per_prompt
    plan.append(PlannedStage(StageKind.SCORE, round_number, images, needs=_all(plan)))
    plan.append(PlannedStage(StageKind.SELECT, round_number, 1, needs=_last(plan)))
    select = len(plan) - 1
    if spec.fusion is not None:
        plan += _fuse_shards(sizes, round_number, pairs * _fusion_rows(spec.fusion, spec.sampling), (select,))
    needs = tuple(range(select, len(plan)))
    plan.append(PlannedStage(StageKind.VERIFY, round_number, sizes.prompts * pairs, needs=needs))
    if spec.review:
        plan.append(PlannedStage(StageKind.REVIEW, round_number, 1, needs=_last(plan)))
    work = _training_rows(spec, sizes.prompts, _BACKWARD_WORK)
    plan.append(PlannedStage(StageKind.TRAIN, round_number, work, needs=_last(plan)))
    if round_number in evaluated_rounds(spec):
        plan = _joined(plan, _evaluation(spec, round_number, sizes), _last(plan))
    return plan


def total_work(spec: JobSpec, sizes: Sizes) -> float:
    """The work of all stages of all rounds."""
    work = sum(stage.work for stage in plan_start(spec, sizes))
    if isinstance(spec, RoundSpec):
        later = (plan_round(spec, number, sizes) for number in range(2, spec.rounds + 1))
        work += sum(stage.work for plan in later for stage in plan)
    return work


def _plan_fusion(spec: FusionJobSpec, sizes: Sizes) -> list[PlannedStage]:
    pairs = _fusion_pairs(spec, sizes)
    plan = [PlannedStage(StageKind.SCORE, 0, max(1, pairs)), PlannedStage(StageKind.SELECT, 0, 1, needs=(0,))]
    rows = _fusion_rows(spec.fusion, sizes.sampling)
    if spec.sampling is not None:
        plan += _fuse_shards(sizes, 0, pairs_at_most(spec.pairing, sizes.samples_per_prompt) * rows, (1,))
    else:
        size = sizes.shard_prompts * 4
        plan += [
            PlannedStage(StageKind.FUSE, 0, (stop - start) * rows, shard, {"pairs": [start, stop]}, (1,))
            for shard, (start, stop) in enumerate(_shards(sizes.pairs, size))
        ]
    return [*plan, PlannedStage(StageKind.VERIFY, 0, max(1, pairs), needs=tuple(range(1, len(plan))))]


def _fusion_pairs(spec: FusionJobSpec, sizes: Sizes) -> int:
    if spec.sampling is None:
        return sizes.pairs
    return sizes.prompts * pairs_at_most(spec.pairing, sizes.samples_per_prompt)


def _plan_evaluation(spec: EvaluationJobSpec, sizes: Sizes) -> list[PlannedStage]:
    work = spec.samples_per_prompt * _sampling_rows(spec.sampling)
    shards = (
        (params | {"model": model}, count)
        for model in sizes.models
        for params, count in _evaluation_shards(sizes, spec.samples_per_prompt)
    )
    plan = [
        PlannedStage(StageKind.EVALUATE, 0, prompts * work, shard, params)
        for shard, (params, prompts) in enumerate(shards)
    ]
    return [*plan, PlannedStage(StageKind.COMPARE, 0, 1, needs=_all(plan))]


def _evaluation(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """Measuring the model after a round: shards that make and score images, and what they add up to."""
    samples = spec.evaluation.samples_per_prompt if spec.evaluation else 0
    plan = [
        PlannedStage(StageKind.EVALUATE, round_number, prompts * samples * _sampling_rows(spec.sampling), shard, params)
        for shard, (params, prompts) in enumerate(_evaluation_shards(sizes, samples))
    ]
    return [*plan, PlannedStage(StageKind.COMPARE, round_number, 1, needs=_all(plan))]


def _evaluation_shards(sizes: Sizes, samples_per_prompt: int) -> Iterator[tuple[dict[str, Any], int]]:
    """What a shard measures on, and its number of prompts."""
    size = max(sizes.shard_prompts, ceil(_EVALUATED_TOGETHER / max(1, samples_per_prompt)))
    for one in sizes.measured:
        for start, stop in _shards(one.prompts, size):
            yield {"split": one.split, "set": one.set_id, "prompts": [start, stop]}, stop - start


def _sample_shards(sizes: Sizes, round_number: int, work_per_prompt: int) -> list[PlannedStage]:
    return _prompt_shards(StageKind.SAMPLE, sizes, round_number, work_per_prompt, ())


def _fuse_shards(sizes: Sizes, round_number: int, work_per_prompt: int, needs: tuple[int, ...]) -> list[PlannedStage]:
    return _prompt_shards(StageKind.FUSE, sizes, round_number, work_per_prompt, needs)


def _prompt_shards(
    kind: StageKind, sizes: Sizes, round_number: int, work_per_prompt: int, needs: tuple[int, ...]
) -> list[PlannedStage]:
    return [
        PlannedStage(kind, round_number, (stop - start) * work_per_prompt, shard, {"prompts": [start, stop]}, needs)
        for shard, (start, stop) in enumerate(_shards(sizes.prompts, sizes.shard_prompts))
    ]


def _joined(
    first: list[PlannedStage], second: Iterable[PlannedStage], needs: tuple[int, ...] = ()
) -> list[PlannedStage]:
    """Both plans as one; the stages of the second that need nothing need `needs` of the first."""
    offset = len(first)
    moved = [
        PlannedStage(s.kind, s.round, s.work, s.shard, s.params, tuple(n + offset for n in s.needs) or needs)
        for s in second
    ]
    return first + moved


def _shards(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges, `size` each."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _all(plan: list[PlannedStage]) -> tuple[int, ...]:
    return tuple(range(len(plan)))


def _last(plan: list[PlannedStage]) -> tuple[int, ...]:
    return (len(plan) - 1,)


def _guidance_rows(sampling: SamplingConfig) -> int:
    return 1 if sampling.guidance_scale == 1 else 2


def _sampling_rows(sampling: SamplingConfig) -> int:
    """U-Net evaluations of one image."""
    return sampling.num_steps * _guidance_rows(sampling)


def _fusion_rows(fusion: FusionConfig, sampling: SamplingConfig) -> int:
    """U-Net evaluations of one target: itself and its reference in the fused steps, itself after them; an inversion
    takes two more a step."""
    steps = sampling.num_steps
    fused = fusion.steps(steps)
    inversion = 2 * steps if fusion.trajectory == "ddim_inversion" else 0
    return (2 * len(fused) + steps - fused.stop + inversion) * _guidance_rows(sampling)


def _rows_per_pair(training: TrainingConfig, sampling: SamplingConfig, update_work: int = 1) -> int:
    """U-Net evaluations that one pair takes at most: both trajectories, once at each step that an inner epoch draws,
    and `update_work` times in the updates."""
    steps = max(1, round(sampling.num_steps * training.timestep_fraction))
    evaluated = min(sampling.num_steps, steps * training.inner_epochs)
    updated = steps * training.inner_epochs
    return 2 * (evaluated + update_work * updated) * _guidance_rows(sampling)


def _training_rows(spec: RoundSpec, prompts: int, update_work: int = 1) -> int:
    """U-Net evaluations of one round's training: pairs, or all samples where ddpo and dpok learn without fusion."""
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt) * prompts
    if spec.training.algorithm != "dpo" and spec.fusion is None:
        pairs = ceil(prompts * spec.samples_per_prompt / 2)
    return pairs * _rows_per_pair(spec.training, spec.sampling, update_work)


def measured_splits(
    prompt_set_id: str, held_out_id: str | None, sizes: Mapping[str, int]
) -> tuple[PromptsToMeasure, ...]:
    """What the models of a round job are measured on: the training prompts, and the held-out ones if there are any."""
    train = PromptsToMeasure(Split.TRAIN, prompt_set_id, sizes[prompt_set_id])
    if held_out_id is None:
        return (train,)
    return train, PromptsToMeasure(Split.HELD_OUT, held_out_id, sizes[held_out_id])
