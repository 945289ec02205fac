"""Export jobs: an adapter, or the pairs of a job, in a format of other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, get_args

from pydantic import Field, model_validator

from dfusion.config import SamplingConfig
from dfusion.errors import FieldsError
from dfusion.prompts import MAX_LENGTH
from dfusion.recipes import ExportFormat
from service.jobs.kinds.base import EXAMPLE_JOB, EXAMPLE_MODEL, Checked, Kind, Labelled, Name, Seed, require_one
from service.plan import PlannedStage, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.jobs.checking import Checker


_FORMATS = ", ".join(get_args(ExportFormat))


class ExportJobSpec(Labelled):
    """The adapter of a model in a format of other programs, or the pairs of a job as a dataset."""

    model: Name | None = Field(None, description=f"A trained model by id or alias, for {_FORMATS}")
    job: Name | None = Field(None, description="A job with pairs, for parquet")
    format: ExportFormat | Literal["parquet"]
    prefer: Literal["adoption", "verdicts"] = Field(
        "adoption", description="parquet: what decides the preferred side of a pair, as for a training"
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_LENGTH,
        description="Prompt of the preview. null = one of the model's training",
    )
    seed: Seed = Field(0, description="Seed of the preview")
    sampling: SamplingConfig | None = Field(
        None, description="Sampling of the preview. null = that of the model's training, if a round job trained it"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_one(self, "model", "job")
        if (self.format == "parquet") != (self.job is not None):
            message = "expected `job` with format parquet, and `model` with all other formats"
            raise FieldsError(message, "format")

        for name in ("prompt", "sampling"):
            if self.job is not None and getattr(self, name) is not None:
                raise FieldsError(f"expected no {name} with format parquet, which has no preview", name)
        return self


def check(checker: Checker, spec: ExportJobSpec) -> Checked[ExportJobSpec] | None:
    """Check that the model has an adapter, or the job has pairs."""
    sizes = Sizes(checker.shard_prompts)
    if spec.job is not None:
        job = checker.job("/job", spec.job)
        if job is not None and not checker.has_pairs(job.id):
            checker.wrong("/job", f"expected a job with pairs, got {job.id} without", "no_pairs")
        return Checked(spec, sizes)

    model, base = checker.model("/model", spec.model or "")
    if model is not None and model.adapter_artifact_id is None:
        checker.wrong("/model", f"expected a model with an adapter, got the base model {spec.model}", "no_adapter")
    if spec.prompt is not None:
        checker.fits_prompt("/prompt", base, spec.prompt)
    if spec.sampling is not None:
        checker.fits_sampling(base, spec.sampling)
    return Checked(spec, sizes, model)


def count(_spec: ExportJobSpec, _sizes: Sizes) -> WorkCounts:
    """No images."""
    return WorkCounts()


def totals(_spec: ExportJobSpec, _sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    return {StageKind.EXPORT: StageTotals(1, 1)}


def plan(_spec: ExportJobSpec, _sizes: Sizes) -> list[PlannedStage]:
    """The stages: export."""
    return [PlannedStage(StageKind.EXPORT, 0, 1)]


KIND = Kind(
    name=JobKind.EXPORT,
    path="/exports",
    operation="start_export",
    description="Export the adapter of a model for diffusers, for ComfyUI and A1111, for peft, or merged into its base,"
    " with a preview and its recipe; or the pairs of a job as a parquet dataset.",
    spec=ExportJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    examples={
        "kohya": {
            "summary": "An adapter for ComfyUI and A1111",
            "value": {"model": EXAMPLE_MODEL, "format": "kohya"},
        },
        "parquet": {"summary": "The pairs of a job as a dataset", "value": {"job": EXAMPLE_JOB, "format": "parquet"}},
    },
)
