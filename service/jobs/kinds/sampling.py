"""Sampling jobs: images of a model on prompts, with scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from service.jobs.kinds.base import Checked, Kind, SamplesSpec, ScorerRefs
from service.jobs.kinds.work import Shards, added, of_prompts, sampling_rows, scoring
from service.plan import PlannedStage, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.jobs.checking import Checker


class SamplingJobSpec(SamplesSpec):
    """Samples with their trajectories and item maps, so that they can be fused later."""

    samples_per_prompt: int = Field(4, ge=1, le=1024)
    mask_source: Literal["first_up", "resolution"] = Field("first_up", description="As in a fusion (Eq. 4)")
    scorers: ScorerRefs | None = Field(None, description="Scorers of the samples. Default: the model's scorers")


def check(checker: Checker, spec: SamplingJobSpec) -> Checked[SamplingJobSpec] | None:
    """Check the model, the prompts and the scorers."""
    model, base = checker.model("/model", spec.model)
    prompt_set, new_set = checker.prompts(spec)
    checker.fits_prompts("/prompts" if spec.prompts else "/prompt_set", base, prompt_set)
    checker.fits_sampling(base, spec.sampling)

    scorers = checker.scorers("/scorers", spec.scorers, base, base.reward if base else None)
    checker.quotes_text("/prompts" if spec.prompts else "/prompt_set", prompt_set, scorers or ())
    checker.limit_images(prompt_set, spec.samples_per_prompt)
    if prompt_set is None or model is None:
        return None

    filled = spec.model_copy(update={"scorers": scorers})
    return Checked(filled, Sizes(checker.shard_prompts, len(prompt_set.prompts)), model, prompt_set, None, new_set)


def count(spec: SamplingJobSpec, sizes: Sizes) -> WorkCounts:
    """The samples of all prompts."""
    images = sizes.prompts * spec.samples_per_prompt
    return WorkCounts(sampled=images, sampling=images * sampling_rows(spec.sampling))


def totals(spec: SamplingJobSpec, sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    sample, score = _shards(spec, sizes)
    return {StageKind.SAMPLE: sample.totals, StageKind.SCORE: score.totals, StageKind.COMPARE: StageTotals(1, 1)}


def _shards(spec: SamplingJobSpec, sizes: Sizes) -> tuple[Shards, Shards]:
    """The sampling and the scoring stages."""
    sample = of_prompts(StageKind.SAMPLE, sizes, spec.samples_per_prompt * sampling_rows(spec.sampling))
    return sample, scoring(StageKind.SCORE, sample, spec.samples_per_prompt, spec.samples_per_prompt)


def plan(spec: SamplingJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """The stages: sample and score (both sharded by prompts), compare."""
    sample, score = _shards(spec, sizes)
    stages = sample.stages(0)
    scores = added(stages, score.stages_after(sample, 0, 0))
    return [*stages, PlannedStage(StageKind.COMPARE, 0, 1, needs=scores)]


KIND = Kind(
    name=JobKind.SAMPLING,
    path="/samplings",
    operation="start_sampling",
    description="Sample a model on prompts. Trajectories and item maps are stored, so that samples can be fused later.",
    spec=SamplingJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    examples={
        "named": {
            "summary": "Four images of each prompt of a prompt set",
            "value": {"model": "shapes", "prompt_set": "shapes-attribute-test", "samples_per_prompt": 4},
        }
    },
)
