"""Round jobs: online training in rounds of sampling, scoring, pairing, fusing, verifying, training and measuring.

The stages of a round are planned together. The transaction that ends the training of a round plans the next one, so
that verdicts or an early stop can take effect between two rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dfusion.config import FusionConfig, PairingConfig, StrictModel, TrainingConfig
from dfusion.errors import FieldsError
from dfusion.rewards.signs import SIGNS, SignName
from service.jobs.kinds.base import Checked, Example, Kind, Name, PresetSpec, SamplesSpec, ScorerRef, ScorerRefs, Seed
from service.jobs.kinds.work import (
    BACKWARD_WORK,
    Shards,
    added,
    all_of,
    evaluation_shards,
    evaluation_totals,
    fusion_rows,
    joined,
    of_prompts,
    pairs_at_most,
    rows_per_pair,
    sampling_rows,
    scoring,
    times,
)
from service.plan import PlannedStage, PromptsToMeasure, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, Split, StageKind

if TYPE_CHECKING:
    from service.jobs.checking import Checker


class EvaluationSpec(StrictModel):
    """The evaluation of a round job's models, on the same prompts and seeds in every round."""

    samples_per_prompt: int = Field(1, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="Scorers of the images. Default: the model's scorers")
    every_round: bool = Field(True, description="true = after every round, false = before the first and after the last")
    seed: Seed = 0


def _policy_of(value: Any) -> Any:
    return {False: "none", True: "required"}[value] if isinstance(value, bool) else value


ReviewPolicy = Annotated[Literal["none", "sample", "required"], BeforeValidator(_policy_of)]
"""The pairs of a round that must have a verdict before the training. Requests of version 0.1.0 have a boolean."""
Rounds = Annotated[int, Field(ge=1, le=1000)]
StopWhen = Annotated[tuple[SignName, ...], Field(max_length=len(SIGNS))]
"""The warning signs that end a run."""


class RoundSpec(SamplesSpec, PresetSpec):
    """Online training: rounds of sampling, scoring, pairing, fusing, verifying, training and measuring."""

    held_out_prompt_set: Name | None = Field(None, description="Prompts that are measured and never trained on")
    rounds: Rounds = 1
    samples_per_prompt: int = Field(16, ge=2, le=1024, description="Samples per prompt; a pair needs two")
    fusion: FusionConfig | None = Field(FusionConfig(), description="null = naive pairs, without fused targets")
    pairing: PairingConfig = PairingConfig()
    training: TrainingConfig = TrainingConfig()
    reward: ScorerRef | None = Field(None, description="The scorer to train on. Default: the model's reward")
    watch: ScorerRef | None = Field(
        None, description="Held-out scorer of the same samples, never trained on. Default: that of the model"
    )
    evaluation: EvaluationSpec | None = Field(EvaluationSpec(), description="null = no evaluation")
    stop_when: StopWhen = Field(
        (),
        description="Warning signs after which the job ends before its last round: misleading_reward, saturation, "
        "collapse. Each round then starts after the evaluation of the previous one",
    )
    review: ReviewPolicy = Field(
        "none",
        description="Pairs of each round that must have a verdict before the training: none, a sample of"
        " `review_pairs`, or required = all. false and true mean none and required",
    )
    review_pairs: int | None = Field(None, ge=1, le=100_000, description="Pairs of each round, for `sample`")
    update_reward: Literal["score", "verdict"] = Field(
        "score",
        description="What ddpo and dpok learn from: scores, or verdicts of the review (preferred +1, tie 0, other -1)",
    )

    @model_validator(mode="after")
    def _has_a_sample(self) -> Self:
        if (self.review == "sample") != (self.review_pairs is not None):
            raise FieldsError("expected review_pairs with review = sample, and only with it", "review_pairs")
        return self

    @property
    def is_reviewed(self) -> bool:
        """Whether the training of each round waits for verdicts."""
        return self.review != "none"


def check(checker: Checker, spec: RoundSpec) -> Checked[RoundSpec] | None:
    """Check the model, the prompts, the settings of the method, and the scorers."""
    # the model and the prompts
    model, base = checker.model("/model", spec.model)
    prompt_set, new_set = checker.prompts(spec)
    held_out = checker.prompt_set("/held_out_prompt_set", spec.held_out_prompt_set)
    checker.fits_prompts("/prompts" if spec.prompts else "/prompt_set", base, prompt_set)
    checker.fits_prompts("/held_out_prompt_set", base, held_out)

    # the settings of the method
    checker.fits_layers(base, spec.fusion)
    if spec.fusion is not None:
        checker.fits_steps(spec.fusion, spec.sampling)
    checker.fits_sampling(base, spec.sampling)

    # the scorers
    reward = spec.reward or (base.reward if base else None)
    watch = spec.watch or (base.watch if base else None)
    checker.scorer("/reward", reward or "", "the model has no default reward", of_round=True)
    if spec.is_reviewed and spec.update_reward == "score":
        checker.learns_from_verdicts("/review", spec.training)
    if spec.update_reward == "verdict":
        checker.learns_from_rewards("/update_reward", spec.training)
        if not spec.is_reviewed:
            checker.wrong("/update_reward", "expected a review, which gives the verdicts", "invalid_request")
    if watch is not None:
        checker.scorer("/watch", watch)
    evaluation = spec.evaluation
    if evaluation is not None:
        scorers = checker.scorers("/evaluation/scorers", evaluation.scorers, base, reward)
        evaluation = evaluation.model_copy(update={"scorers": scorers})
    measuring = (evaluation.scorers or ()) if evaluation else ()
    checker.quotes_text("/prompts" if spec.prompts else "/prompt_set", prompt_set, (reward, watch, *measuring))
    checker.quotes_text("/held_out_prompt_set", held_out, measuring)

    # the number of images, and an adapter to continue
    checker.limit_images(prompt_set, spec.samples_per_prompt)
    checker.continues(model, spec.training)
    if prompt_set is None or model is None:
        return None

    # the defaults and the sizes
    filled = spec.model_copy(update={"reward": reward, "watch": watch, "evaluation": evaluation})
    set_sizes = {row.id: len(row.prompts) for row in (prompt_set, held_out) if row is not None}
    measured = measured_splits(prompt_set.id, held_out.id if held_out else None, set_sizes)
    sizes = Sizes(checker.shard_prompts, len(prompt_set.prompts), measured=measured)
    return Checked(filled, sizes, model, prompt_set, held_out, new_set)


def measured_splits(
    prompt_set_id: str, held_out_id: str | None, sizes: Mapping[str, int]
) -> tuple[PromptsToMeasure, ...]:
    """The prompt sets that a round job measures its models on.

    Args:
        prompt_set_id: The training prompts.
        held_out_id: The held-out prompts.
        sizes: The numbers of prompts, by set id.
    """
    train = PromptsToMeasure(Split.TRAIN, prompt_set_id, sizes[prompt_set_id])
    if held_out_id is None:
        return (train,)
    return train, PromptsToMeasure(Split.HELD_OUT, held_out_id, sizes[held_out_id])


def count(spec: RoundSpec, sizes: Sizes) -> WorkCounts:
    """The work of all rounds and evaluations."""
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
    """The rounds after which the model is measured; 0 is before the first round."""
    if spec.evaluation is None:
        return ()
    return tuple(range(spec.rounds + 1)) if spec.evaluation.every_round else (0, spec.rounds)


def last_stage_kind(spec: RoundSpec, round_number: int) -> StageKind:
    """The kind of the stage that ends a round: the comparison of its evaluation, or else its training."""
    return StageKind.COMPARE if round_number in evaluated_rounds(spec) else StageKind.TRAIN


def planning_stage_kind(spec: RoundSpec, round_number: int) -> StageKind:
    """The kind of the stage whose end starts the next round: the training, unless the evaluation can end the job."""
    return last_stage_kind(spec, round_number) if spec.stop_when else StageKind.TRAIN


def _training_rows(spec: RoundSpec, prompts: int, update_work: int = 1) -> int:
    """U-Net evaluations of the training of one round, at most.

    It trains on pairs, or on all samples if its algorithm learns from samples and nothing is fused.
    """
    pairs = pairs_at_most(spec.pairing, spec.samples_per_prompt) * prompts
    if not spec.training.learns_from_pairs and spec.fusion is None:
        pairs = ceil(prompts * spec.samples_per_prompt / 2)
    return pairs * rows_per_pair(spec.training, spec.sampling, update_work)


def totals(spec: RoundSpec, sizes: Sizes) -> Totals:
    """The stages of `plan` and of `plan_round` for all further rounds."""
    return _totals(spec, sizes, spec.rounds, len(evaluated_rounds(spec)))


def totals_after(spec: RoundSpec, rounds_before: int, sizes: Sizes) -> Totals:
    """The stages of `plan_round` for all rounds after the first `rounds_before`, of which there is at least one."""
    evaluated = [number for number in evaluated_rounds(spec) if number > rounds_before]
    return _totals(spec, sizes, spec.rounds - rounds_before, len(evaluated))


def _totals(spec: RoundSpec, sizes: Sizes, rounds: int, evaluations: int) -> Totals:
    """The stages of this number of rounds and of evaluations."""
    # 1. the stages of each round
    shards = _shards(spec, sizes)
    of_round = {
        StageKind.SAMPLE: shards.sample.totals,
        StageKind.SCORE: shards.score.totals,
        StageKind.SELECT: StageTotals(1, 1),
        StageKind.VERIFY: shards.verify.totals,
        StageKind.TRAIN: StageTotals(1, _training_rows(spec, sizes.prompts, BACKWARD_WORK)),
    }
    if spec.fusion is not None:
        of_round[StageKind.FUSE] = shards.fuse.totals
    if spec.is_reviewed:
        of_round[StageKind.REVIEW] = StageTotals(1, 1)
    of_job = {kind: times(rounds, stages) for kind, stages in of_round.items()}

    # 2. those of the evaluations
    if spec.evaluation is not None:
        evaluate = evaluation_totals(sizes, spec.evaluation.samples_per_prompt, sampling_rows(spec.sampling))
        of_job[StageKind.EVALUATE] = times(evaluations, evaluate)
        of_job[StageKind.COMPARE] = StageTotals(evaluations, evaluations)
    return of_job


@dataclass(frozen=True)
class _Shards:
    """The stages of a round that share its prompts."""

    sample: Shards
    score: Shards
    fuse: Shards
    verify: Shards


def _shards(spec: RoundSpec, sizes: Sizes) -> _Shards:
    images = spec.samples_per_prompt
    pairs = pairs_at_most(spec.pairing, images)
    fused_rows = 0 if spec.fusion is None else fusion_rows(spec.fusion, spec.sampling)
    sample = of_prompts(StageKind.SAMPLE, sizes, images * sampling_rows(spec.sampling))
    fuse = of_prompts(StageKind.FUSE, sizes, pairs * fused_rows)
    return _Shards(
        sample, scoring(StageKind.SCORE, sample, images, images), fuse, scoring(StageKind.VERIFY, fuse, pairs, pairs)
    )


def plan(spec: RoundSpec, sizes: Sizes) -> list[PlannedStage]:
    """The evaluation before the first round, and the stages of the first round."""
    first = _evaluation(spec, 0, sizes) if evaluated_rounds(spec) else []
    return joined(first, plan_round(spec, 1, sizes))


def plan_round(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The stages of one round.

    They are sample, score, select, fuse, verify, [review,] train and evaluate; select, review and train are one stage
    each, the others are sharded.
    """
    shards = _shards(spec, sizes)

    # 1. samples, their scores, and pairs
    stages = shards.sample.stages(round_number)
    scores = added(stages, shards.score.stages_after(shards.sample, 0, round_number))
    select = added(stages, [PlannedStage(StageKind.SELECT, round_number, 1, needs=scores)])

    # 2. targets and their adoption
    if spec.fusion is None:
        verify = added(stages, shards.verify.stages(round_number, select))
    else:
        added(stages, shards.fuse.stages(round_number, select))
        verify = added(stages, shards.verify.stages_after(shards.fuse, select[0] + 1, round_number))
    needs = verify
    if spec.is_reviewed:
        needs = added(stages, [PlannedStage(StageKind.REVIEW, round_number, 1, needs=verify)])

    # 3. the next model and its evaluation
    work = _training_rows(spec, sizes.prompts, BACKWARD_WORK)
    train = added(stages, [PlannedStage(StageKind.TRAIN, round_number, work, needs=needs)])
    if round_number in evaluated_rounds(spec):
        stages = joined(stages, _evaluation(spec, round_number, sizes), train)
    return stages


def plan_last_evaluation(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The evaluation of a job that ends after a round, which its plan may have left out."""
    is_missing = spec.evaluation is not None and round_number not in evaluated_rounds(spec)
    return _evaluation(spec, round_number, sizes) if is_missing else []


def _evaluation(spec: RoundSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The stages that evaluate the model after a round: evaluate (sharded), compare."""
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
"""A request on the built-in prompt sets."""

KIND = Kind(
    name=JobKind.ROUND,
    path="/rounds",
    operation="start_rounds",
    description="Train a model online, in rounds, on pairs of its own samples. Returns at once; follow the job at"
    " `Location`.",
    spec=RoundSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    rounds=lambda spec: spec.rounds,
    plan_round=plan_round,
    examples={
        "named": {"summary": "Three rounds on a built-in prompt set", "value": EXAMPLE},
        "own": {
            "summary": "Prompts in the request, few steps, a review before each training",
            "value": {
                "model": "shapes",
                "prompts": [{"text": "a red and striped [circle]"}, {"text": "a blue and dotted [star]"}],
                "samples_per_prompt": 4,
                "sampling": {"num_steps": 10},
                "fusion": {"first_step": 5, "last_step": 9},
                "training": {"learning_rate": 0.001, "examples_per_update": 2, "inner_epochs": 1},
                "review": "required",
            },
        },
        "naive": {
            "summary": "DDPO without fusion, as compared in the paper",
            "value": {
                "prompt_set": "shapes-attribute-train",
                "fusion": None,
                "training": {"algorithm": "ddpo"},
                "evaluation": None,
            },
        },
    },
)
