"""An export: an adapter, or a job's pairs, in a form that other programs read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from service.jobs.kinds.base import EXAMPLE_JOB, EXAMPLE_MODEL, Checked, Kind, Labelled, Name, require_one
from service.plan import PlannedStage, Sizes, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.jobs.checking import Checker


class ExportJobSpec(Labelled):
    """A model's adapter in a form that other programs read, or a job's pairs as a data set."""

    model: Name | None = Field(None, description="The id of a trained model, for diffusers, kohya and merged")
    job: Name | None = Field(None, description="A job with pairs, for parquet")
    format: Literal["diffusers", "kohya", "merged", "parquet"]
    prefer: Literal["adoption", "verdicts"] = Field(
        "adoption", description="parquet: which side of a pair is better, as for a training"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_one(self, "model", "job")
        if (self.format == "parquet") != (self.job is not None):
            raise ValueError("expected `job` with format parquet, and `model` with the others")
        return self


def check(checker: Checker, spec: ExportJobSpec) -> Checked[ExportJobSpec] | None:
    """A model with an adapter, or a job with pairs."""
    sizes = Sizes(checker.shard_prompts)
    if spec.job is not None:
        job = checker.job("/job", spec.job)
        if job is not None and not checker.has_pairs(job.id):
            checker.wrong("/job", f"{job.id} has no pairs", "no_pairs")
        return Checked(spec, sizes)

    model, _ = checker.model("/model", spec.model or "")
    if model is not None and model.adapter_artifact_id is None:
        checker.wrong("/model", f"{spec.model} is a base model: it has no adapter to export", "no_adapter")
    return Checked(spec, sizes, model)


def count(_spec: ExportJobSpec, _sizes: Sizes) -> WorkCounts:
    """No image is made that is kept."""
    return WorkCounts()


def plan(_spec: ExportJobSpec, _sizes: Sizes) -> list[PlannedStage]:
    """Export."""
    return [PlannedStage(StageKind.EXPORT, 0, 1)]


KIND = Kind(
    name=JobKind.EXPORT,
    path="/exports",
    operation="start_export",
    description="Write a model's adapter for diffusers, ComfyUI and A1111, or merged; or a job's pairs as a parquet"
    " data set.",
    spec=ExportJobSpec,
    check=check,
    count=count,
    plan=plan,
    examples={
        "kohya": {
            "summary": "An adapter for ComfyUI and A1111",
            "value": {"model": EXAMPLE_MODEL, "format": "kohya"},
        },
        "parquet": {"summary": "A job's pairs as a data set", "value": {"job": EXAMPLE_JOB, "format": "parquet"}},
    },
)
