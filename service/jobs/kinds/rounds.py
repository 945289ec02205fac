"""Online training: rounds of sampling, scoring, pairing, fusing, verifying, training and measuring.

The stages of a round are planned together; the next round is planned in the transaction that ends a round's
training, so a later decision (people's verdicts, an early stop) can come between two rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

from pydantic import Field

from dfusion.config import FusionConfig, PairingConfig, StrictModel, TrainingConfig
from service.jobs.kinds.base import Checked, Example, Kind, Name, PresetSpec, SamplesSpec, ScorerRef, ScorerRefs, Seed
from service.jobs.kinds.work import (
    BACKWARD_WORK,
    all_of,
    evaluation_shards,
    fuse_shards,
    fusion_rows,
    joined,
    last_of,
    pairs_at_most,
    rows_per_pair,
    sample_shards,
    sampling_rows,
)
from service.plan import PlannedStage, PromptsToMeasure, Sizes, WorkCounts
from service.states import JobKind, Split, StageKind

if TYPE_CHECKING:
    from service.jobs.checking import Checker


class EvaluationSpec(StrictModel):
    """How the models of a round job are measured: the same prompts and seeds every round."""

    samples_per_prompt: int = Field(1, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="By whom; the model's usual scorers if not given")
    every_round: bool = Field(True, description="After every round; otherwise before the first and after the last")
    seed: Seed = 0


class RoundSpec(SamplesSpec, PresetSpec):
    """Online training: rounds of sampling, scoring, pairing, fusing, verifying, training and measuring."""

    held_out_prompt_set: Name | None = Field(None, description="Measured on, never trained on")
    rounds: int = Field(1, ge=1, le=1000)
    samples_per_prompt: int = Field(16, ge=2, le=1024, description="A pair takes two")
    fusion: FusionConfig | None = Field(FusionConfig(), description="null: naive, without fused targets")
    pairing: PairingConfig = PairingConfig()
    training: TrainingConfig = TrainingConfig()
    reward: ScorerRef | None = Field(None, description="Trained against; the model's own if not given")
    watch: ScorerRef | None = Field(
        None, description="Scores the same samples and is never trained on; the model's own if not given"
    )
    evaluation: EvaluationSpec | None = Field(EvaluationSpec(), description="null: the models are not measured")
    review: bool = Field(False, description="Whether each round waits for people's verdicts before it trains")


def check(checker: Checker, spec: RoundSpec) -> Checked[RoundSpec] | None:
    """The model, the prompts to train and to measure on, the method's settings, and the scorers."""
    # the model and the prompts
    model, base = checker.model("/model", spec.model)
    prompt_set, new_set = checker.prompts(spec)
    held_out = checker.prompt_set("/held_out_prompt_set", spec.held_out_prompt_set)
    checker.fits_prompts("/prompts" if spec.prompts else "/prompt_set", base, prompt_set)
    checker.fits_prompts("/held_out_prompt_set", base, held_out)

    # the method's settings
    checker.fits_layers(base, spec.fusion)
    if spec.fusion is not None:
        checker.fits_steps(spec.fusion, spec.sampling)
    checker.fits_sampling(base, spec.sampling)

    # who scores
    reward = spec.reward or (base.reward if base else None)
    watch = spec.watch or (base.watch if base else None)
    checker.scorer("/reward", reward or "", "the model has no default reward")
    if spec.review:
        checker.learns_from_verdicts("/review", spec.training)
    if watch is not None:
        checker.scorer("/watch", watch)
    evaluation = spec.evaluation
    if evaluation is not None:
        scorers = checker.scorers("/evaluation/scorers", evaluation.scorers, base, reward)
        evaluation = evaluation.model_copy(update={"scorers": scorers})

    checker.limit_images(prompt_set, spec.samples_per_prompt)
    checker.adapter_is_kept(model, spec.training)
    if prompt_set is None or model is None:
        return None

    filled = spec.model_copy(update={"reward": reward, "watch": watch, "evaluation": evaluation})
    set_sizes = {row.id: len(row.prompts) for row in (prompt_set, held_out) if row is not None}
    measured = measured_splits(prompt_set.id, held_out.id if held_out else None, set_sizes)
    sizes = Sizes(checker.shard_prompts, len(prompt_set.prompts), measured=measured)
    return Checked(filled, sizes, model, prompt_set, held_out, new_set)


def measured_splits(
    prompt_set_id: str, held_out_id: str | None, sizes: Mapping[str, int]
) -> tuple[PromptsToMeasure, ...]:
    """What the models of a round job are measured on: the training prompts, and the held-out ones if there are any."""
    train = PromptsToMeasure(Split.TRAIN, prompt_set_id, sizes[prompt_set_id])
    if held_out_id is None:
        return (train,)
    return train, PromptsToMeasure(Split.HELD_OUT, held_out_id, sizes[held_out_id])


def count(spec: RoundSpec, sizes: Sizes) -> WorkCounts:
    """All rounds, and the measurements before, between and after them."""
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt) * sizes.prompts * spec.rounds
    per_evaluation = 0 if spec.evaluation is None else spec.evaluation.samples_per_prompt
    evaluated = sizes.measured_prompts * per_evaluation * len(evaluated_rounds(spec))
    sampled = sizes.prompts * spec.samples_per_prompt * spec.rounds
    return WorkCounts(
        sampled=sampled,
        fused_at_most=0 if spec.fusion is None else pairs,
        evaluated=evaluated,
        sampling=sampled * sampling_rows(spec.sampling),
        fusion_at_most=0 if spec.fusion is None else pairs * fusion_rows(spec.fusion, spec.sampling),
        training_at_most=spec.rounds * _training_rows(spec, sizes.prompts),
        evaluation=evaluated * sampling_rows(spec.sampling),
    )


def evaluated_rounds(spec: RoundSpec) -> tuple[int, ...]:
    """The rounds after which the model is measured; 0 is before the first."""
    if spec.evaluation is None:
        return ()
    return tuple(range(spec.rounds + 1)) if spec.evaluation.every_round else (0, spec.rounds)


def _training_rows(spec: RoundSpec, prompts: int, update_work: int = 1) -> int:
    """U-Net evaluations of one round's training: its pairs, or all samples where it learns from samples without
    fusion."""
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt) * prompts
    if not spec.training.learns_from_pairs and spec.fusion is None:
        pairs = ceil(prompts * spec.samples_per_prompt / 2)
    return pairs * rows_per_pair(spec.training, spec.sampling, update_work)


def plan(spec: RoundSpec, sizes: Sizes) -> list[PlannedStage]:
    """Measure the model before the first round, and the first round."""
    first = _evaluation(spec, 0, sizes) if evaluated_rounds(spec) else []
    return joined(first, plan_round(spec, 1, sizes))


def plan_round(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The stages of one round: sample shards, score, select, fuse shards, verify, (review,) train, evaluate."""
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt)
    images = sizes.prompts * spec.samples_per_prompt

    # 1. samples with scores, and pairs of them
    stages = sample_shards(sizes, round_number, spec.samples_per_prompt * sampling_rows(spec.sampling))
    stages.append(PlannedStage(StageKind.SCORE, round_number, images, needs=all_of(stages)))
    stages.append(PlannedStage(StageKind.SELECT, round_number, 1, needs=last_of(stages)))
    select = len(stages) - 1

    # 2. targets, adopted or not
    if spec.fusion is not None:
        stages += fuse_shards(sizes, round_number, pairs * fusion_rows(spec.fusion, spec.sampling), (select,))
    needs = tuple(range(select, len(stages)))
    stages.append(PlannedStage(StageKind.VERIFY, round_number, sizes.prompts * pairs, needs=needs))
    if spec.review:
        stages.append(PlannedStage(StageKind.REVIEW, round_number, 1, needs=last_of(stages)))

    # 3. the next model, and how good it is
    work = _training_rows(spec, sizes.prompts, BACKWARD_WORK)
    stages.append(PlannedStage(StageKind.TRAIN, round_number, work, needs=last_of(stages)))
    if round_number in evaluated_rounds(spec):
        stages = joined(stages, _evaluation(spec, round_number, sizes), last_of(stages))
    return stages


def _evaluation(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """Measuring the model after a round: shards that make and score images, and what they add up to."""
    samples = spec.evaluation.samples_per_prompt if spec.evaluation else 0
    work = samples * sampling_rows(spec.sampling)
    stages = [
        PlannedStage(StageKind.EVALUATE, round_number, prompts * work, shard, params)
        for shard, (params, prompts) in enumerate(evaluation_shards(sizes, samples))
    ]
    return [*stages, PlannedStage(StageKind.COMPARE, round_number, 1, needs=all_of(stages))]


EXAMPLE: Example = {
    "model": "shapes",
    "prompt_set": "shapes-attribute-train",
    "held_out_prompt_set": "shapes-attribute-test",
    "rounds": 3,
    "samples_per_prompt": 8,
    "seed": 1,
}
"""A request for rounds on lists that are there from the start."""

KIND = Kind(
    name=JobKind.ROUND,
    path="/rounds",
    operation="start_rounds",
    description="Train a model online, for some rounds, on pairs of its own samples. Answers at once; follow"
    " `Location`.",
    spec=RoundSpec,
    check=check,
    count=count,
    plan=plan,
    rounds=lambda spec: spec.rounds,
    plan_round=plan_round,
    examples={
        "named": {"summary": "Three rounds on a list that is there from the start", "value": EXAMPLE},
        "own": {
            "summary": "One's own prompts, few steps, verdicts of people before it trains",
            "value": {
                "model": "shapes",
                "prompts": [{"text": "a red and striped [circle]"}, {"text": "a blue and dotted [star]"}],
                "samples_per_prompt": 4,
                "sampling": {"num_steps": 10},
                "fusion": {"first_step": 5, "last_step": 9},
                "training": {"learning_rate": 0.001, "examples_per_update": 2, "inner_epochs": 1},
                "review": True,
            },
        },
        "naive": {
            "summary": "DDPO without fusion, as the paper's comparison",
            "value": {
                "prompt_set": "shapes-attribute-train",
                "fusion": None,
                "training": {"algorithm": "ddpo"},
                "evaluation": None,
            },
        },
    },
)
