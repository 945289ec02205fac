"""An evaluation: models on the same prompts and seeds, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from dfusion.config import SamplingConfig
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
from service.jobs.kinds.work import all_of, evaluation_shards, sampling_rows
from service.plan import PlannedStage, PromptsToMeasure, Sizes, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.catalogue import InstalledModel
    from service.db.tables import PromptSet
    from service.jobs.checking import Checker

OWN_PROMPTS = "prompts"
"""What the prompts that come with an evaluation are called among its lists."""


class EvaluationJobSpec(Labelled):
    """Models on the same prompts and seeds, compared (section 4.5; table 1)."""

    models: tuple[Name, ...] = Field(min_length=1, max_length=16, description="The first is what others are held to")
    prompt_sets: tuple[Name, ...] | None = Field(
        None, min_length=1, max_length=8, description="Each is measured by itself: trained prompts, unseen ones"
    )
    prompts: tuple[Prompt, ...] | None = Field(
        None, min_length=1, max_length=10_000, description="Further prompts, measured as a list of their own"
    )
    samples_per_prompt: int = Field(4, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="By whom; the models' usual scorers if not given")
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the bootstrap intervals")
    resamples: int = Field(10_000, ge=100, le=100_000)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.prompt_sets is None and self.prompts is None:
            raise ValueError("expected prompt_sets, prompts or both, got none")
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"models: expected each once, got {list(self.models)}")
        return self


def check(checker: Checker, spec: EvaluationJobSpec) -> Checked[EvaluationJobSpec] | None:
    """The models, the prompt sets, which all models must take, and the scorers."""
    # the models
    looked_up = [checker.model(f"/models/{n}", name) for n, name in enumerate(spec.models)]
    models = [model for model, _ in looked_up if model is not None]
    bases = [base for _, base in looked_up if base is not None]
    if len({model.id for model in models}) < len(models):
        checker.wrong("/models", "expected different models, got one under two names", "invalid_request")

    # the prompts
    sets = [checker.prompt_set(f"/prompt_sets/{n}", name) for n, name in enumerate(spec.prompt_sets or ())]
    new_set = checker.new_set(spec.prompts) if spec.prompts else None
    _check_names(checker, sets, new_set)
    for base in {base.name: base for base in bases}.values():
        checker.fits_sampling(base, spec.sampling)
        checker.fits_prompts("/prompts", base, new_set)
        for n, row in enumerate(sets):
            checker.fits_prompts(f"/prompt_sets/{n}", base, row)

    # who scores
    scorers = spec.scorers or _usual_scorers(bases)
    if not scorers:
        checker.wrong("/scorers", "the models have no scorers of their own; name some", "unknown_scorer")
    checker.scorer_list("/scorers", scorers)

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


def _check_names(checker: Checker, sets: Sequence[PromptSet | None], new_set: PromptSet | None) -> None:
    """Each list has a name of its own among the metrics."""
    names = [row.name or row.id for row in sets if row is not None]
    if len(set(names)) < len(names):
        checker.wrong("/prompt_sets", f"expected each set once, got {names}", "invalid_request")
    if OWN_PROMPTS in names and new_set is not None:
        message = f"{OWN_PROMPTS!r} is what the prompts of the request are called: measure that set by itself"
        checker.wrong("/prompt_sets", message, "invalid_request")


def _usual_scorers(bases: Sequence[InstalledModel]) -> tuple[ScorerRef, ...]:
    """Those that judge the models' images, each once; for a model without any its reward."""
    names = [name for base in bases for name in (base.scorers or (base.reward,))]
    return tuple(dict.fromkeys(name for name in names if name))


def count(spec: EvaluationJobSpec, sizes: Sizes) -> WorkCounts:
    """Every model's images of every prompt."""
    images = len(sizes.models) * sizes.measured_prompts * spec.samples_per_prompt
    return WorkCounts(evaluated=images, evaluation=images * sampling_rows(spec.sampling))


def plan(spec: EvaluationJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """Evaluate (shards by model and prompts), compare."""
    work = spec.samples_per_prompt * sampling_rows(spec.sampling)
    stages: list[PlannedStage] = []
    for model in sizes.models:
        for params, prompts in evaluation_shards(sizes, spec.samples_per_prompt):
            named = params | {"model": model}
            stages.append(PlannedStage(StageKind.EVALUATE, 0, prompts * work, len(stages), named))
    return [*stages, PlannedStage(StageKind.COMPARE, 0, 1, needs=all_of(stages))]


def resolved(params: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ids of the models and prompt sets that the stages measure."""
    shards = [of_stage for of_stage in params if "model" in of_stage]
    return {
        "models": tuple(dict.fromkeys(shard["model"] for shard in shards)),
        "prompt_sets": tuple(dict.fromkeys(shard["set"] for shard in shards if shard["split"] != OWN_PROMPTS)),
    }


KIND = Kind(
    name=JobKind.EVALUATION,
    path="/evaluations",
    operation="start_evaluation",
    description="Measure models on the same prompts and seeds, with confidence intervals and paired comparison.",
    spec=EvaluationJobSpec,
    check=check,
    count=count,
    plan=plan,
    resolved=resolved,
    examples={
        "named": {
            "summary": "A base model on two lists",
            "value": {
                "models": ["shapes"],
                "prompt_sets": ["shapes-attribute-train", "shapes-attribute-test"],
                "samples_per_prompt": 2,
            },
        },
        "before_and_after": {
            "summary": "A trained model against what it was trained from",
            "value": {
                "models": [EXAMPLE_BASE_MODEL, EXAMPLE_MODEL],
                "prompts": [{"text": "a green [triangle]"}],
                "scorers": ["shapes-clip", "shapes-judge"],
            },
        },
    },
)
