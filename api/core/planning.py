"""From a spec to stages: what a round consists of, what waits for what, and how much work each stage is.

The stages of a round are planned together; the next round is planned in the transaction that ends a round's
training, so a later decision (people's verdicts, an early stop) can come between two rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import floor
from typing import Any

from api.core.specs import RoundSpec
from api.core.states import StageKind

_BACKWARD_WORK = 3
"""A training row's forward and backward pass against a forward pass alone."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage to be made; `needs` are places in the same plan."""

    kind: StageKind
    round: int
    work: float
    shard: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Counts:
    """Images and U-Net evaluations (one row through the U-Net is one; guidance takes two) of some rounds.

    Fused targets and training rows are upper bounds: a pair needs two samples with different scores.
    """

    prompts: int
    held_out_prompts: int
    sampled: int
    fused_at_most: int
    evaluated: int
    sampling: int
    fusion_at_most: int
    training_at_most: int
    evaluation: int

    @property
    def images(self) -> int:
        return self.sampled + self.fused_at_most + self.evaluated

    @property
    def unet_evaluations(self) -> int:
        return self.sampling + self.fusion_at_most + self.training_at_most + self.evaluation


def pairs_at_most(spec: RoundSpec) -> int:
    """An upper bound on the pairs of one prompt in one round."""
    references = max(1, floor(spec.pairing.reference_share * spec.samples_per_prompt))
    bases = max(1, floor(spec.pairing.base_share * spec.samples_per_prompt))
    return min(references * spec.pairing.reference_uses, bases)


def evaluated_rounds(spec: RoundSpec) -> tuple[int, ...]:
    """The rounds after which the model is measured; 0 is before the first."""
    if spec.evaluation is None:
        return ()
    return tuple(range(spec.rounds + 1)) if spec.evaluation.every_round else (0, spec.rounds)


def count(spec: RoundSpec, prompts: int, held_out_prompts: int) -> Counts:
    """What the whole job takes."""
    pairs = pairs_at_most(spec) * prompts
    per_evaluation = 0 if spec.evaluation is None else spec.evaluation.samples_per_prompt
    evaluated = (prompts + held_out_prompts) * per_evaluation * len(evaluated_rounds(spec))
    sampled = prompts * spec.samples_per_prompt * spec.rounds
    return Counts(
        prompts=prompts,
        held_out_prompts=held_out_prompts,
        sampled=sampled,
        fused_at_most=0 if spec.fusion is None else pairs * spec.rounds,
        evaluated=evaluated,
        sampling=sampled * _sampling_rows(spec),
        fusion_at_most=pairs * spec.rounds * _fusion_rows(spec),
        training_at_most=pairs * spec.rounds * _training_rows(spec, 1 + spec.training.inner_epochs),
        evaluation=evaluated * _sampling_rows(spec),
    )


def plan_start(spec: RoundSpec, prompts: int, held_out_prompts: int, shard_prompts: int) -> list[PlannedStage]:
    """The job's first stages: measuring the model that it starts from, and round 1."""
    plan = [_evaluation(spec, 0, prompts, held_out_prompts)] if evaluated_rounds(spec) else []
    return _appended(plan, plan_round(spec, 1, prompts, held_out_prompts, shard_prompts))


def plan_round(
    spec: RoundSpec, round_number: int, prompts: int, held_out_prompts: int, shard_prompts: int
) -> list[PlannedStage]:
    """The stages of one round: sample shards, score, select, fuse shards, verify, train, evaluate."""
    shards = list(_shards(prompts, shard_prompts))
    pairs = pairs_at_most(spec)
    plan = [
        PlannedStage(
            StageKind.SAMPLE,
            round_number,
            (stop - start) * spec.samples_per_prompt * _sampling_rows(spec),
            shard,
            {"prompts": [start, stop]},
        )
        for shard, (start, stop) in enumerate(shards)
    ]
    plan.append(PlannedStage(StageKind.SCORE, round_number, prompts * spec.samples_per_prompt, needs=_all(plan)))
    plan.append(PlannedStage(StageKind.SELECT, round_number, 1, needs=(len(plan) - 1,)))
    select = len(plan) - 1
    if spec.fusion is not None:
        plan += [
            PlannedStage(
                StageKind.FUSE,
                round_number,
                (stop - start) * pairs * _fusion_rows(spec),
                shard,
                {"prompts": [start, stop]},
                (select,),
            )
            for shard, (start, stop) in enumerate(shards)
        ]
    needs = tuple(range(select, len(plan)))
    plan.append(PlannedStage(StageKind.VERIFY, round_number, prompts * pairs, needs=needs))
    work = prompts * pairs * _training_rows(spec, 1 + _BACKWARD_WORK * spec.training.inner_epochs)
    plan.append(PlannedStage(StageKind.TRAIN, round_number, work, needs=(len(plan) - 1,)))
    if round_number in evaluated_rounds(spec):
        evaluation = _evaluation(spec, round_number, prompts, held_out_prompts, needs=(len(plan) - 1,))
        plan.append(evaluation)
    return plan


def total_work(spec: RoundSpec, prompts: int, held_out_prompts: int, shard_prompts: int) -> float:
    """The work of all stages of all rounds."""
    start = sum(stage.work for stage in plan_start(spec, prompts, held_out_prompts, shard_prompts))
    later = sum(
        stage.work
        for number in range(2, spec.rounds + 1)
        for stage in plan_round(spec, number, prompts, held_out_prompts, shard_prompts)
    )
    return start + later


def _evaluation(
    spec: RoundSpec, round_number: int, prompts: int, held_out_prompts: int, needs: tuple[int, ...] = ()
) -> PlannedStage:
    images = (prompts + held_out_prompts) * (spec.evaluation.samples_per_prompt if spec.evaluation else 0)
    return PlannedStage(StageKind.EVALUATE, round_number, images * _sampling_rows(spec), needs=needs)


def _appended(first: list[PlannedStage], second: list[PlannedStage]) -> list[PlannedStage]:
    moved = [
        PlannedStage(s.kind, s.round, s.work, s.shard, s.params, tuple(n + len(first) for n in s.needs)) for s in second
    ]
    return first + moved


def _shards(prompts: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of prompt indices, `size` each."""
    for start in range(0, prompts, size):
        yield start, min(start + size, prompts)


def _all(plan: list[PlannedStage]) -> tuple[int, ...]:
    return tuple(range(len(plan)))


def _guidance_rows(spec: RoundSpec) -> int:
    return 1 if spec.sampling.guidance_scale == 1 else 2


def _sampling_rows(spec: RoundSpec) -> int:
    """U-Net evaluations of one image."""
    return spec.sampling.num_steps * _guidance_rows(spec)


def _fusion_rows(spec: RoundSpec) -> int:
    """U-Net evaluations of one target: itself and its reference in the fused steps, itself after them."""
    if spec.fusion is None:
        return 0
    steps = spec.sampling.num_steps
    fused = min(spec.fusion.last_step + 1, steps) - spec.fusion.first_step
    return (2 * fused + max(0, steps - spec.fusion.last_step - 1)) * _guidance_rows(spec)


def _training_rows(spec: RoundSpec, passes: int) -> int:
    """U-Net evaluations that one pair takes in training: both trajectories at every step, `passes` times."""
    return 2 * spec.sampling.num_steps * _guidance_rows(spec) * passes
