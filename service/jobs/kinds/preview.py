"""Preview jobs: small images of how stored samples were denoised, and of the masks of references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from service.jobs.kinds.base import (
    EXAMPLE_PAIR,
    EXAMPLE_REFERENCE,
    Checked,
    Kind,
    Labelled,
    Name,
    TrajectoriesRead,
    require_one,
)
from service.plan import PlannedStage, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.db.tables import Sample
    from service.jobs.checking import Checker


class PreviewJobSpec(Labelled):
    """Small images of stored trajectories: of named samples, or of all samples of a pair."""

    samples: tuple[Name, ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Samples. A reference has the masks of the newest pair that it belongs to",
    )
    pair: Name | None = Field(
        None, description="A pair: its base, reference and target, and the masks with its thresholds"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        require_one(self, "samples", "pair")
        return self


def check(checker: Checker, spec: PreviewJobSpec) -> Checked[PreviewJobSpec] | None:
    """Check that the samples are of one base model and have stored trajectories."""
    samples = _samples(checker, spec)
    if not samples:
        return None

    pointer = "/pair" if spec.samples is None else "/samples"
    without = [sample.id for sample in samples if sample.trajectory_artifact_id is None]
    if without:
        checker.wrong(
            pointer, f"expected samples with stored trajectories, got {', '.join(without)}", "trajectory_gone"
        )
    checker.one_base(pointer, {sample.model_id for sample in samples})
    return Checked(spec, Sizes(checker.shard_prompts), checker.base_row(samples[0].model_id))


def _samples(checker: Checker, spec: PreviewJobSpec) -> list[Sample]:
    """The samples that the request names."""
    if spec.pair is not None:
        pair = checker.pair("/pair", spec.pair)
        return [] if pair is None else list(checker.samples_of(pair).values())

    names = spec.samples or ()
    rows = checker.samples(names)
    for n, name in enumerate(names):
        if name not in rows:
            checker.wrong(f"/samples/{n}", "unknown sample", "unknown_sample")
    return list(rows.values())


def count(_spec: PreviewJobSpec, _sizes: Sizes) -> WorkCounts:
    """No images of a model, and no U-Net evaluation."""
    return WorkCounts()


def totals(_spec: PreviewJobSpec, _sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    return {StageKind.PREVIEW: StageTotals(1, 1)}


def plan(_spec: PreviewJobSpec, _sizes: Sizes) -> list[PlannedStage]:
    """The stages: preview."""
    return [PlannedStage(StageKind.PREVIEW, 0, 1)]


def reads(spec: PreviewJobSpec) -> TrajectoriesRead:
    """The trajectories to decode."""
    if spec.pair is not None:
        return TrajectoriesRead(pairs=(spec.pair,))
    return TrajectoriesRead(samples=spec.samples or ())


KIND = Kind(
    name=JobKind.PREVIEW,
    path="/previews",
    operation="start_preview",
    description="Make small images of stored samples: their denoising steps, and the masks of references by item and"
    " step. Samples that have previews are not decoded again: if all have, the job that made them is returned,"
    " and the Idempotency-Key is not stored.",
    spec=PreviewJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    reads=reads,
    examples={
        "pair": {"summary": "The samples of a pair, with its masks", "value": {"pair": EXAMPLE_PAIR}},
        "samples": {"summary": "Named samples", "value": {"samples": [EXAMPLE_REFERENCE]}},
    },
)
