"""Evaluation jobs: models compared on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from dfusion.config import SamplingConfig
from dfusion.errors import FieldsError
from dfusion.prompts import Prompt
from service.jobs.kinds.base import (
    EXAMPLE_BASE_MODEL,
    EXAMPLE_MODEL,
    Checked,
    Kind,
    Labelled,
    Name,
    ScorerRef,
    ScorerRefs,
    Seed,
)
from service.jobs.kinds.work import all_of, evaluation_shards, evaluation_totals, sampling_rows, times
from service.plan import PlannedStage, PromptsToMeasure, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.catalogue import InstalledModel
    from service.db.tables import PromptSet
    from service.jobs.checking import Checker

OWN_PROMPTS = "prompts"
"""The split name of the prompts that an evaluation's request contains."""


class EvaluationJobSpec(Labelled):
    """A comparison of models on the same prompts and seeds (section 4.5; table 1)."""

    models: tuple[Name, ...] = Field(
        min_length=1, max_length=16, description="The models; all others are compared with the first"
    )
    prompt_sets: tuple[Name, ...] | None = Field(
        None, min_length=1, max_length=8, description="Prompt sets, each measured separately: training, held-out …"
    )
    prompts: tuple[Prompt, ...] | None = Field(
        None, min_length=1, max_length=10_000, description="Further prompts, measured as a separate set"
    )
    samples_per_prompt: int = Field(4, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="Scorers of the images. Default: the models' scorers")
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence level of the bootstrap intervals")
    resamples: int = Field(10_000, ge=100, le=100_000)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.prompt_sets is None and self.prompts is None:
            raise FieldsError("expected prompt_sets, prompts or both, got none", "prompt_sets", "prompts")
        if len(set(self.models)) != len(self.models):
            raise FieldsError(f"models: expected each model once, got {list(self.models)}", "models")
        return self


def check(checker: Checker, spec: EvaluationJobSpec) -> Checked[EvaluationJobSpec] | None:
    """Check the models, the prompt sets, which must fit all models, and the scorers."""
    # the models
    lookups = [checker.model(f"/models/{n}", name) for n, name in enumerate(spec.models)]
    models = [model for model, _ in lookups if model is not None]
    bases = [base for _, base in lookups if base is not None]
    if len({model.id for model in models}) < len(models):
        checker.wrong("/models", "expected different models, got one model under two names", "invalid_request")

    # the prompts
    sets = [checker.prompt_set(f"/prompt_sets/{n}", name) for n, name in enumerate(spec.prompt_sets or ())]
    new_set = checker.new_set(spec.prompts) if spec.prompts else None
    _check_split_names(checker, sets, new_set)
    for base in {base.name: base for base in bases}.values():
        checker.fits_sampling(base, spec.sampling)
        checker.fits_prompts("/prompts", base, new_set)
        for n, row in enumerate(sets):
            checker.fits_prompts(f"/prompt_sets/{n}", base, row)

    # the scorers
    scorers = spec.scorers or _default_scorers(bases)
    if not scorers:
        checker.wrong("/scorers", "the models have no default scorers; expected at least one", "unknown_scorer")
    checker.scorer_list("/scorers", scorers)
    checker.quotes_text("/prompts", new_set, scorers)
    for n, row in enumerate(sets):
        checker.quotes_text(f"/prompt_sets/{n}", row, scorers)

    # the sizes
    measured = tuple(
        PromptsToMeasure(row.name or (OWN_PROMPTS if row is new_set else row.id), row.id, len(row.prompts))
        for row in (*sets, new_set)
        if row is not None
    )
    images = sum(prompts.prompts for prompts in measured) * spec.samples_per_prompt * len(models)
    checker.limit("/samples_per_prompt", images)
    if not models:
        return None
    ids = tuple(model.id for model in models)
    sizes = Sizes(checker.shard_prompts, models=ids, measured=measured)
    return Checked(spec.model_copy(update={"scorers": scorers}), sizes, models[0], None, None, new_set)


def _check_split_names(checker: Checker, sets: Sequence[PromptSet | None], new_set: PromptSet | None) -> None:
    """Every prompt set has a unique name among the splits of the metrics."""
    names = [row.name or row.id for row in sets if row is not None]
    if len(set(names)) < len(names):
        checker.wrong("/prompt_sets", f"expected each prompt set once, got {names}", "invalid_request")
    if OWN_PROMPTS in names and new_set is not None:
        message = f"expected no prompt set named {OWN_PROMPTS!r} together with `prompts`, which has this name"
        checker.wrong("/prompt_sets", message, "invalid_request")


def _default_scorers(bases: Sequence[InstalledModel]) -> tuple[ScorerRef, ...]:
    """The default scorers of these models, each once; the reward for a model without scorers."""
    names: dict[str, None] = {}
    for base in bases:
        names |= dict.fromkeys(base.scorers or ((base.reward,) if base.reward else ()))
    return tuple(names)


def count(spec: EvaluationJobSpec, sizes: Sizes) -> WorkCounts:
    """The images of all models on all prompts."""
    images = len(sizes.models) * sizes.measured_prompts * spec.samples_per_prompt
    return WorkCounts(evaluated=images, evaluation=images * sampling_rows(spec.sampling))


def totals(spec: EvaluationJobSpec, sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    of_model = evaluation_totals(sizes, spec.samples_per_prompt, sampling_rows(spec.sampling))
    return {StageKind.EVALUATE: times(len(sizes.models), of_model), StageKind.COMPARE: StageTotals(1, 1)}


def plan(spec: EvaluationJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """The stages: evaluate (sharded by model and prompts), compare."""
    work = spec.samples_per_prompt * sampling_rows(spec.sampling)
    stages: list[PlannedStage] = []
    for model in sizes.models:
        for shard, prompts in evaluation_shards(sizes, spec.samples_per_prompt):
            params = shard | {"model": model}
            stages.append(PlannedStage(StageKind.EVALUATE, 0, prompts * work, len(stages), params))
    return [*stages, PlannedStage(StageKind.COMPARE, 0, 1, needs=all_of(stages))]


def resolved(params: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ids of the models and prompt sets that the stages measure."""
    shards = [stage_params for stage_params in params if "model" in stage_params]
    models = dict.fromkeys(shard["model"] for shard in shards)
    prompt_sets = dict.fromkeys(shard["set"] for shard in shards if shard["split"] != OWN_PROMPTS)
    return {"models": tuple(models), "prompt_sets": tuple(prompt_sets)}


KIND = Kind(
    name=JobKind.EVALUATION,
    path="/evaluations",
    operation="start_evaluation",
    description="Measure models on the same prompts and seeds, with confidence intervals and paired comparisons.",
    spec=EvaluationJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    resolved=resolved,
    examples={
        "named": {
            "summary": "A base model on two prompt sets",
            "value": {
                "models": ["shapes"],
                "prompt_sets": ["shapes-attribute-train", "shapes-attribute-test"],
                "samples_per_prompt": 2,
            },
        },
        "before_and_after": {
            "summary": "A trained model compared with its base model",
            "value": {
                "models": [EXAMPLE_BASE_MODEL, EXAMPLE_MODEL],
                "prompts": [{"text": "a green [triangle]"}],
                "scorers": ["shapes-clip", "shapes-judge"],
            },
        },
    },
)
