"""A training alone, on stored pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from dfusion.config import TrainingConfig
from service.jobs.kinds.base import (
    EXAMPLE_JOB,
    EXAMPLE_PAIR,
    Checked,
    Kind,
    Labelled,
    Name,
    PresetSpec,
    Seed,
    require_one,
)
from service.jobs.kinds.work import BACKWARD_WORK, rows_per_pair
from service.plan import PlannedStage, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.db.tables import Pair
    from service.jobs.checking import Checker


class TrainingJobSpec(Labelled, PresetSpec):
    """A training alone, on stored pairs."""

    pairs: tuple[Name, ...] | None = Field(None, min_length=1, max_length=10_000)
    jobs: tuple[Name, ...] | None = Field(None, min_length=1, max_length=100, description="All pairs of these jobs")
    model: Name | None = Field(None, description="What is trained on; the model that the pairs' bases are of if null")
    prefer: Literal["adoption", "verdicts"] = Field(
        "adoption",
        description="Which side of a pair is better: by Eq. 7, or as people said (pairs without are left out)",
    )
    training: TrainingConfig = TrainingConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        require_one(self, "pairs", "jobs")
        return self


def check(checker: Checker, spec: TrainingJobSpec) -> Checked[TrainingJobSpec] | None:
    """The pairs, whose samples must fit each other and the model that is trained."""
    pairs = _named_pairs(checker, spec)
    if spec.prefer == "verdicts" and pairs:
        pairs = checker.with_preferred_side(pairs)
        if not pairs:
            checker.wrong("/prefer", "expected pairs that a person prefers a side of, got none", "no_pairs")
    if not pairs:
        return None

    # the samples and the model
    samples = checker.samples_of(pairs)
    if any(sample.trajectory_artifact_id is None for sample in samples.values()):
        checker.wrong("/pairs", "the trajectories of some samples are not kept", "trajectory_gone")
    bases = [samples[pair.base_id] for pair in pairs]
    if spec.model is not None:
        model, _ = checker.model("/model", spec.model)
    else:
        model = checker.one_model("/pairs", bases, "; or give `model`, the one to be trained")
    checker.one_base("/pairs", samples.values(), model)

    # how they were sampled, and how is trained
    sampled_by = {sample.job_id: sample for sample in bases}
    sampled_by |= {sample.job_id: sample for sample in (samples[pair.reference_id] for pair in pairs)}
    jobs = [checker.job_of(sample) for sample in sampled_by.values()]
    checker.adapter_is_kept(model, spec.training)
    checker.one_sampling("/pairs", jobs)
    if spec.prefer == "verdicts":
        checker.learns_from_verdicts("/prefer", spec.training)
    sizes = Sizes(checker.shard_prompts, pairs=len(pairs), sampling=checker.sampling_of(jobs[0]))
    return Checked(spec, sizes, model)


def _named_pairs(checker: Checker, spec: TrainingJobSpec) -> list[Pair]:
    """All pairs that the spec names, each once. Reports names that are unknown, unsuitable or repeated."""
    pairs = checker.named_pairs(spec.pairs or (), spec.jobs or ())
    by_id = {pair.id: pair for pair in pairs}

    # named one by one
    seen: set[str] = set()
    for n, pair_id in enumerate(spec.pairs or ()):
        pair = by_id.get(pair_id) or checker.pair(f"/pairs/{n}", pair_id)
        if pair is None:
            continue
        if pair.adopted is None:
            checker.wrong(f"/pairs/{n}", f"{pair.id} is still being made", "unsuitable_pair")
        if pair.id in seen:
            checker.wrong(f"/pairs/{n}", "expected each pair once", "invalid_request")
        seen.add(pair.id)

    # named by their jobs
    with_pairs = {pair.job_id for pair in pairs}
    for n, job_id in enumerate(spec.jobs or ()):
        job = checker.job(f"/jobs/{n}", job_id)
        if job is None:
            continue
        if job.id not in with_pairs:
            checker.wrong(f"/jobs/{n}", f"{job.id} has no pairs", "no_pairs")
        elif job.id in seen:
            checker.wrong(f"/jobs/{n}", "expected each job once", "invalid_request")
        seen.add(job.id)
    return list(by_id.values())


def count(spec: TrainingJobSpec, sizes: Sizes) -> WorkCounts:
    """Every pair, in each inner epoch."""
    return WorkCounts(training_at_most=sizes.pairs * rows_per_pair(spec.training, sizes.sampling))


def totals(spec: TrainingJobSpec, sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    return {StageKind.TRAIN: StageTotals(1, _work(spec, sizes))}


def plan(spec: TrainingJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """Train."""
    return [PlannedStage(StageKind.TRAIN, 1, _work(spec, sizes))]


def _work(spec: TrainingJobSpec, sizes: Sizes) -> int:
    return sizes.pairs * rows_per_pair(spec.training, sizes.sampling, BACKWARD_WORK)


KIND = Kind(
    name=JobKind.TRAINING,
    path="/trainings",
    operation="start_training",
    description="Train on stored pairs, also on those that people judged.",
    spec=TrainingJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    examples={
        "jobs": {
            "summary": "All pairs of a job",
            "value": {"jobs": [EXAMPLE_JOB], "training": {"learning_rate": 0.0003}},
        },
        "pairs": {"summary": "A few pairs", "value": {"pairs": [EXAMPLE_PAIR], "seed": 3}},
    },
)
