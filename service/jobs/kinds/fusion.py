"""A fusion alone: targets for stored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from dfusion.config import FusionConfig, PairingConfig, StrictModel
from dfusion.prompts import Threshold
from service.jobs.kinds.base import (
    EXAMPLE_BASE,
    EXAMPLE_PAIR,
    EXAMPLE_REFERENCE,
    Checked,
    Kind,
    Labelled,
    Name,
    PresetSpec,
    ScorerRef,
    require_one,
)
from service.jobs.kinds.rounds import RoundSpec
from service.jobs.kinds.sampling import SamplingJobSpec
from service.jobs.kinds.work import fuse_shards, fusion_rows, pairs_at_most, shards
from service.plan import PlannedStage, Sizes, WorkCounts
from service.states import JobKind, JobState, SampleRole, StageKind

if TYPE_CHECKING:
    from service.db.tables import Job, Sample
    from service.jobs.checking import Checker

_PAIRS_TOGETHER = 4
"""Named pairs in one fusion stage, for each prompt of a sampling stage."""


class SamplePair(StrictModel):
    """A reference and a base, samples of one prompt."""

    reference: Name
    base: Name


class FusionJobSpec(Labelled, PresetSpec):
    """Targets for pairs of stored samples: named ones, those of a pair again, or the best and worst of a sampling."""

    pair: Name | None = Field(None, description="A pair to be fused again, from its stored trajectories")
    pairs: tuple[SamplePair, ...] | None = Field(None, min_length=1, max_length=10_000)
    sampling: Name | None = Field(None, description="A job whose samples are paired by their scores")
    fusion: FusionConfig = FusionConfig()
    thresholds: tuple[Threshold, ...] | None = Field(
        None, min_length=1, max_length=64, description="One an item; those of the prompts if not given"
    )
    pairing: PairingConfig = PairingConfig()
    reward: ScorerRef | None = Field(None, description="Whose scores pair and adopt; the model's own if not given")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        require_one(self, "pair", "pairs", "sampling")
        return self


@dataclass(frozen=True)
class _Named:
    """What is to be fused: a job that its samples come from, bases (some, where a sampling is paired), and the number
    of named pairs."""

    job: Job
    bases: list[Sample]
    pairs: int


def check(checker: Checker, spec: FusionJobSpec) -> Checked[FusionJobSpec] | None:
    """The samples, whose model must have the layers and whose sampling must have the steps; the reward."""
    named = _named(checker, spec) if spec.sampling is None else _sampling(checker, spec, spec.sampling)
    if named is None:
        return None

    model = checker.one_model("/pairs", named.bases)
    base = checker.base_of(model)
    checker.fits_layers(base, spec.fusion)
    reward = spec.reward or (base.reward if base else None)
    checker.scorer("/reward", reward or "", "the model has no default reward")
    sampling = checker.sampling_of(named.job)
    checker.fits_steps(spec.fusion, sampling)

    prompt_set = checker.set_by_id(named.job.prompt_set_id)
    per_prompt = prompts = 0
    if spec.sampling is not None:
        sampled = checker.spec_of(named.job)
        per_prompt = sampled.samples_per_prompt if isinstance(sampled, SamplingJobSpec) else 0
        prompts = len(prompt_set.prompts) if prompt_set else 0
    sizes = Sizes(checker.shard_prompts, prompts, per_prompt, named.pairs, sampling)
    return Checked(spec.model_copy(update={"reward": reward}), sizes, model, prompt_set)


def _named(checker: Checker, spec: FusionJobSpec) -> _Named | None:
    """Named samples, or the sides of a pair again."""
    sides = _sides_of_pair(checker, spec.pair) if spec.pair is not None else _sides(checker, spec.pairs or ())
    if checker.problems:
        return None

    _fits_items(checker, spec, [reference for reference, _ in sides])
    samples = [row for side in sides for row in side]
    gone = [row.id for row in samples if row.trajectory_artifact_id is None]
    if gone:
        checker.wrong("/pairs", f"the trajectories of {', '.join(gone[:5])} are not kept", "trajectory_gone")
    sampled_by = {row.job_id: checker.job_of(row) for row in samples}
    for job in sampled_by.values():
        _maps_fit(checker, spec, job)
    checker.one_sampling("/pairs", sampled_by.values())
    return _Named(next(iter(sampled_by.values())), [base for _, base in sides], len(sides))


def _sides_of_pair(checker: Checker, pair_id: str) -> list[tuple[Sample, Sample]]:
    pair = checker.pair("/pair", pair_id)
    if pair is None:
        return []
    rows = checker.samples_of([pair])
    return [(rows[pair.reference_id], rows[pair.base_id])]


def _sides(checker: Checker, pairs: Sequence[SamplePair]) -> list[tuple[Sample, Sample]]:
    """The reference and the base of each pair that is there."""
    rows = checker.samples({i for pair in pairs for i in (pair.reference, pair.base)})
    sides = []
    for n, pair in enumerate(pairs):
        reference, base = rows.get(pair.reference), rows.get(pair.base)
        for role, row in (("reference", reference), ("base", base)):
            if row is None:
                checker.wrong(f"/pairs/{n}/{role}", "there is no such sample", "unknown_sample")
        if reference is not None and base is not None:
            _check_side_by_side(checker, n, reference, base)
            sides.append((reference, base))
    return sides


def _check_side_by_side(checker: Checker, n: int, reference: Sample, base: Sample) -> None:
    if reference.id == base.id:
        checker.wrong(f"/pairs/{n}", "expected two samples, got the same twice", "invalid_request")
    for role, row in (("reference", reference), ("base", base)):
        if row.role == SampleRole.TARGET:
            message = "expected a sample that was sampled, got one that was fused"
            checker.wrong(f"/pairs/{n}/{role}", message, "invalid_request")
    checker.one_base(f"/pairs/{n}", [reference, base])
    if reference.prompt != base.prompt:
        message = f"expected samples of one prompt, got {reference.prompt!r} and {base.prompt!r}"
        checker.wrong(f"/pairs/{n}", message, "prompts_differ")


def _sampling(checker: Checker, spec: FusionJobSpec, job_id: str) -> _Named | None:
    """All samples of a sampling."""
    job = checker.job("/sampling", job_id)
    if job is None:
        return None
    if job.kind != JobKind.SAMPLING or job.state != JobState.SUCCEEDED:
        message = f"expected a sampling that has succeeded, got a {job.kind} that is {job.state}"
        checker.wrong("/sampling", message, "unsuitable_job")
        return None

    sampled = checker.spec_of(job)
    if isinstance(sampled, SamplingJobSpec) and sampled.samples_per_prompt < 2:
        checker.wrong("/sampling", "expected at least two samples a prompt, got one", "unsuitable_job")
    if spec.thresholds is not None:
        checker.wrong("/thresholds", "one list does not fit all prompts of a sampling; give pairs", "invalid_request")
    _maps_fit(checker, spec, job)
    samples = checker.first_samples(job_id)
    if any(sample.trajectory_artifact_id is None for sample in samples):
        checker.wrong("/sampling", f"the trajectories of {job_id} are not kept", "trajectory_gone")
    return _Named(job, samples, 0)


def _maps_fit(checker: Checker, spec: FusionJobSpec, job: Job) -> None:
    """Whether the samples have item maps, recorded where the fusion looks for masks."""
    sampled = checker.spec_of(job)
    source = sampled.mask_source if isinstance(sampled, SamplingJobSpec) else None
    if isinstance(sampled, RoundSpec) and sampled.fusion is not None:
        source = sampled.fusion.mask_source
    if source is None:
        checker.wrong("/pairs", f"{job.id} sampled without item maps, so that nothing can be fused", "no_item_maps")
    elif source != spec.fusion.mask_source:
        message = f"expected {source!r}, where the samples' maps were recorded, got {spec.fusion.mask_source!r}"
        checker.wrong("/fusion/mask_source", message, "invalid_request")


def _fits_items(checker: Checker, spec: FusionJobSpec, references: Sequence[Sample]) -> None:
    """Whether the request's thresholds are as many as each prompt's items."""
    for sample in references if spec.thresholds is not None else ():
        row = checker.set_by_id(sample.prompt_set_id)
        items = row.prompts[sample.prompt_index]["items"] if row is not None else ()
        got = len(spec.thresholds or ())
        if row is not None and len(items) != got:
            message = f"expected {len(items)}, one for each item of {sample.prompt!r}, got {got}"
            checker.wrong("/thresholds", message, "invalid_request")
            return


def count(spec: FusionJobSpec, sizes: Sizes) -> WorkCounts:
    """A target for every pair."""
    pairs = _pairs(spec, sizes)
    return WorkCounts(fused_at_most=pairs, fusion_at_most=pairs * fusion_rows(spec.fusion, sizes.sampling))


def _pairs(spec: FusionJobSpec, sizes: Sizes) -> int:
    if spec.sampling is None:
        return sizes.pairs
    return sizes.prompts * pairs_at_most(spec.pairing, sizes.samples_per_prompt)


def plan(spec: FusionJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """Score what the reward has not seen, select, fuse (shards), verify."""
    pairs = _pairs(spec, sizes)
    rows = fusion_rows(spec.fusion, sizes.sampling)
    stages = [PlannedStage(StageKind.SCORE, 0, max(1, pairs)), PlannedStage(StageKind.SELECT, 0, 1, needs=(0,))]
    if spec.sampling is not None:
        stages += fuse_shards(sizes, 0, pairs_at_most(spec.pairing, sizes.samples_per_prompt) * rows, (1,))
    else:
        size = sizes.shard_prompts * _PAIRS_TOGETHER
        stages += [
            PlannedStage(StageKind.FUSE, 0, (stop - start) * rows, shard, {"pairs": [start, stop]}, (1,))
            for shard, (start, stop) in enumerate(shards(sizes.pairs, size))
        ]
    return [*stages, PlannedStage(StageKind.VERIFY, 0, max(1, pairs), needs=tuple(range(1, len(stages))))]


KIND = Kind(
    name=JobKind.FUSION,
    path="/fusions",
    operation="start_fusion",
    description="Fuse stored samples: named pairs, a pair again with other settings, or the best and worst of a"
    " sampling.",
    spec=FusionJobSpec,
    check=check,
    count=count,
    plan=plan,
    examples={
        "pair": {
            "summary": "A pair again, with other thresholds",
            "value": {"pair": EXAMPLE_PAIR, "thresholds": [0.03], "fusion": {"merge": "or"}, "reward": "shapes-clip"},
        },
        "pairs": {
            "summary": "A reference and a base of one's own choice",
            "value": {"pairs": [{"reference": EXAMPLE_REFERENCE, "base": EXAMPLE_BASE}], "reward": "shapes-clip"},
        },
    },
)
