"""Fusion jobs: targets for stored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
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
    TrajectoriesRead,
    require_one,
)
from service.jobs.kinds.rounds import RoundSpec
from service.jobs.kinds.sampling import SamplingJobSpec
from service.jobs.kinds.work import Shards, added, fusion_rows, of_pairs, of_prompts, pairs_at_most, scoring
from service.plan import PlannedStage, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, JobState, SampleRole, StageKind

if TYPE_CHECKING:
    from service.db.tables import Job, Sample
    from service.jobs.checking import Checker


class SamplePair(StrictModel):
    """A reference and a base of the same prompt, by their sample ids."""

    reference: Name
    base: Name


class FusionJobSpec(Labelled, PresetSpec):
    """Targets for pairs of stored samples: named samples, an existing pair, or the samples of a sampling job."""

    pair: Name | None = Field(None, description="An existing pair to fuse again, from its stored trajectories")
    pairs: tuple[SamplePair, ...] | None = Field(None, min_length=1, max_length=10_000)
    sampling: Name | None = Field(None, description="A sampling job whose samples are paired by their scores")
    fusion: FusionConfig = FusionConfig()
    thresholds: tuple[Threshold, ...] | None = Field(
        None, min_length=1, max_length=64, description="Mask thresholds, one per item. Default: those of the prompts"
    )
    pairing: PairingConfig = PairingConfig()
    reward: ScorerRef | None = Field(
        None, description="The scorer that decides pairs and adoption. Default: the model's reward"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        require_one(self, "pair", "pairs", "sampling")
        return self

    @property
    def source(self) -> str:
        """The JSON pointer of the field that names the samples."""
        return next(f"/{name}" for name in ("pair", "pairs", "sampling") if getattr(self, name) is not None)


@dataclass(frozen=True)
class _Sources:
    """The sources of a fusion.

    job    a job that sampled them
    bases  the bases; only one sample if the samples of a job are still to be paired
    pairs  the number of named pairs
    """

    job: Job
    bases: list[Sample]
    pairs: int


def check(checker: Checker, spec: FusionJobSpec) -> Checked[FusionJobSpec] | None:
    """Check the samples, that their model has the layers and their sampling the steps, and the reward."""
    # the samples
    if spec.sampling is None:
        sources = _named_samples(checker, spec)
    else:
        sources = _samples_of_job(checker, spec, spec.sampling)
    if sources is None:
        return None

    # the model, the reward and the settings
    model = checker.one_model(spec.source, {sample.model_id for sample in sources.bases})
    base = checker.base_of(model)
    checker.fits_layers(base, spec.fusion)
    reward = spec.reward or (base.reward if base else None)
    checker.scorer("/reward", reward or "", "the model has no default reward")
    sampling = checker.samplings([sources.job.id])[sources.job.id]
    checker.fits_steps(spec.fusion, sampling)

    # the sizes
    prompt_set = checker.set_by_id(sources.job.prompt_set_id)
    per_prompt = prompts = 0
    if spec.sampling is not None:
        sampling_spec = checker.spec_of(sources.job)
        per_prompt = sampling_spec.samples_per_prompt if isinstance(sampling_spec, SamplingJobSpec) else 0
        prompts = len(prompt_set.prompts) if prompt_set else 0
    sizes = Sizes(checker.shard_prompts, prompts, per_prompt, sources.pairs, sampling)
    return Checked(spec.model_copy(update={"reward": reward}), sizes, model, prompt_set)


def _named_samples(checker: Checker, spec: FusionJobSpec) -> _Sources | None:
    """Check the named samples, or the samples of the named pair."""
    sides = _sides_of_pair(checker, spec.pair) if spec.pair is not None else _sides(checker, spec.pairs or ())
    if checker.problems:
        return None

    _check_thresholds(checker, spec, [reference for reference, _ in sides])
    samples = list(chain.from_iterable(sides))
    without = [sample.id for sample in samples if sample.trajectory_artifact_id is None]
    if without:
        message = f"the trajectories of {', '.join(without[:5])} are no longer stored"
        checker.wrong(spec.source, message, "trajectory_gone")

    sampled_by = checker.jobs_of(samples)
    for job in sampled_by.values():
        _check_item_maps(checker, spec, job)
    checker.one_sampling(spec.source, checker.samplings(sampled_by).values())
    return _Sources(next(iter(sampled_by.values())), [base for _, base in sides], len(sides))


def _sides_of_pair(checker: Checker, pair_id: str) -> list[tuple[Sample, Sample]]:
    pair = checker.pair("/pair", pair_id)
    if pair is None:
        return []
    rows = checker.samples_of(pair)
    return [(rows[pair.reference_id], rows[pair.base_id])]


def _sides(checker: Checker, pairs: Sequence[SamplePair]) -> list[tuple[Sample, Sample]]:
    """The reference and the base of each pair whose samples exist."""
    rows = checker.samples({pair.reference for pair in pairs} | {pair.base for pair in pairs})
    checker.load_models({sample.model_id for sample in rows.values()})
    sides = []
    for n, pair in enumerate(pairs):
        reference = rows.get(pair.reference)
        base = rows.get(pair.base)
        for role, sample in (("reference", reference), ("base", base)):
            if sample is None:
                checker.wrong(f"/pairs/{n}/{role}", "unknown sample", "unknown_sample")

        if reference is not None and base is not None:
            _check_pair(checker, n, reference, base)
            sides.append((reference, base))
    return sides


def _check_pair(checker: Checker, n: int, reference: Sample, base: Sample) -> None:
    """The two samples are different, not fused, and have the same base model and prompt."""
    if reference.id == base.id:
        checker.wrong(f"/pairs/{n}", "expected two samples, got one sample twice", "invalid_request")
    for role, sample in (("reference", reference), ("base", base)):
        if sample.role == SampleRole.TARGET:
            message = "expected a sample of a model, got a fused target"
            checker.wrong(f"/pairs/{n}/{role}", message, "invalid_request")
    checker.one_base(f"/pairs/{n}", {reference.model_id, base.model_id})
    if reference.prompt != base.prompt:
        message = f"expected samples of one prompt, got {reference.prompt!r} and {base.prompt!r}"
        checker.wrong(f"/pairs/{n}", message, "prompts_differ")


def _samples_of_job(checker: Checker, spec: FusionJobSpec, job_id: str) -> _Sources | None:
    """Check the sampling job whose samples are paired."""
    job = checker.job("/sampling", job_id)
    if job is None:
        return None
    if job.kind != JobKind.SAMPLING or job.state != JobState.SUCCEEDED:
        message = f"expected a sampling job that has succeeded, got a {job.kind} job that is {job.state}"
        checker.wrong("/sampling", message, "unsuitable_job")
        return None

    sampling_spec = checker.spec_of(job)
    if isinstance(sampling_spec, SamplingJobSpec) and sampling_spec.samples_per_prompt < 2:
        checker.wrong("/sampling", "expected at least two samples per prompt, got one", "unsuitable_job")
    if spec.thresholds is not None:
        message = "expected no thresholds with `sampling`, since its prompts can differ in their items; use `pairs`"
        checker.wrong("/thresholds", message, "invalid_request")
    _check_item_maps(checker, spec, job)

    samples = checker.first_samples(job_id)
    if any(sample.trajectory_artifact_id is None for sample in samples):
        checker.wrong("/sampling", f"the trajectories of {job_id} are no longer stored", "trajectory_gone")
    return _Sources(job, samples, 0)


def _check_item_maps(checker: Checker, spec: FusionJobSpec, job: Job) -> None:
    """The samples of the job have item maps from the mask source of the fusion."""
    job_spec = checker.spec_of(job)
    recorded = job_spec.mask_source if isinstance(job_spec, SamplingJobSpec) else None
    if isinstance(job_spec, RoundSpec) and job_spec.fusion is not None:
        recorded = job_spec.fusion.mask_source

    if recorded is None:
        message = f"expected samples with item maps, got those of {job.id} without"
        checker.wrong(spec.source, message, "no_item_maps")
    elif recorded != spec.fusion.mask_source:
        message = f"expected {recorded!r}, the mask source of the samples, got {spec.fusion.mask_source!r}"
        checker.wrong("/fusion/mask_source", message, "invalid_request")


def _check_thresholds(checker: Checker, spec: FusionJobSpec, references: Sequence[Sample]) -> None:
    """The request has as many thresholds as each prompt has items."""
    if spec.thresholds is None:
        return

    set_ids = {sample.prompt_set_id for sample in references if sample.prompt_set_id is not None}
    prompt_sets = checker.sets_by_id(set_ids)
    for sample in references:
        prompt_set = prompt_sets.get(sample.prompt_set_id or "")
        if prompt_set is None:
            continue
        items = prompt_set.prompts[sample.prompt_index]["items"]
        if len(items) != len(spec.thresholds):
            message = f"expected {len(items)}, one per item of {sample.prompt!r}, got {len(spec.thresholds)}"
            checker.wrong("/thresholds", message, "invalid_request")
            return


def count(spec: FusionJobSpec, sizes: Sizes) -> WorkCounts:
    """One target per pair."""
    pairs = _pairs(spec, sizes)
    return WorkCounts(fused_at_most=pairs, fusion_at_most=pairs * fusion_rows(spec.fusion, sizes.sampling))


def _pairs(spec: FusionJobSpec, sizes: Sizes) -> int:
    if spec.sampling is None:
        return sizes.pairs
    return sizes.prompts * pairs_at_most(spec.pairing, sizes.samples_per_prompt)


def totals(spec: FusionJobSpec, sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    score, fuse, verify = _shards(spec, sizes)
    return {
        StageKind.SCORE: score.totals,
        StageKind.SELECT: StageTotals(1, 1),
        StageKind.FUSE: fuse.totals,
        StageKind.VERIFY: verify.totals,
    }


def _shards(spec: FusionJobSpec, sizes: Sizes) -> tuple[Shards, Shards, Shards]:
    """The scoring, fusion and verifying stages: by prompts of a sampling, or by named pairs."""
    rows = fusion_rows(spec.fusion, sizes.sampling)
    if spec.sampling is None:
        fuse = of_pairs(StageKind.FUSE, sizes, rows)
        return scoring(StageKind.SCORE, fuse, 2, 1), fuse, scoring(StageKind.VERIFY, fuse, 1, 1)

    pairs = pairs_at_most(spec.pairing, sizes.samples_per_prompt)
    fuse = of_prompts(StageKind.FUSE, sizes, pairs * rows)
    score = scoring(StageKind.SCORE, fuse, sizes.samples_per_prompt, pairs)
    return score, fuse, scoring(StageKind.VERIFY, fuse, pairs, pairs)


def plan(spec: FusionJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """The stages: score the samples without a score of the reward, select, fuse, verify. All but select are sharded."""
    score, fuse, verify = _shards(spec, sizes)
    stages = score.stages(0)
    select = added(stages, [PlannedStage(StageKind.SELECT, 0, 1, needs=tuple(range(len(stages))))])
    added(stages, fuse.stages(0, select))
    return [*stages, *verify.stages_after(fuse, select[0] + 1, 0)]


def reads(spec: FusionJobSpec) -> TrajectoriesRead:
    """The trajectories of the references and bases."""
    if spec.sampling is not None:
        return TrajectoriesRead(jobs=(spec.sampling,))
    if spec.pair is not None:
        return TrajectoriesRead(pairs=(spec.pair,))
    samples = {sample for side in spec.pairs or () for sample in (side.reference, side.base)}
    return TrajectoriesRead(samples=samples)


KIND = Kind(
    name=JobKind.FUSION,
    path="/fusions",
    operation="start_fusion",
    description="Fuse stored samples: named pairs, an existing pair with other settings, or the best and worst samples"
    " of a sampling job.",
    spec=FusionJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    reads=reads,
    examples={
        "pair": {
            "summary": "An existing pair with other thresholds",
            "value": {"pair": EXAMPLE_PAIR, "thresholds": [0.03], "fusion": {"merge": "or"}, "reward": "shapes-clip"},
        },
        "pairs": {
            "summary": "A named reference and base",
            "value": {"pairs": [{"reference": EXAMPLE_REFERENCE, "base": EXAMPLE_BASE}], "reward": "shapes-clip"},
        },
    },
)
