"""Training jobs: a training on stored pairs, without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from dfusion.config import TrainingConfig
from service.ids import IdKind
from service.jobs.kinds.base import (
    EXAMPLE_JOB,
    EXAMPLE_PAIR,
    Checked,
    Kind,
    Labelled,
    Name,
    PresetSpec,
    Seed,
    TrajectoriesRead,
    require_one,
)
from service.jobs.kinds.work import BACKWARD_WORK, rows_per_pair
from service.plan import PlannedStage, Sizes, StageTotals, Totals, WorkCounts
from service.states import JobKind, StageKind

if TYPE_CHECKING:
    from service.jobs.checking import Checker


class TrainingJobSpec(Labelled, PresetSpec):
    """A training on stored pairs, without sampling."""

    pairs: tuple[Name, ...] | None = Field(None, min_length=1, max_length=10_000)
    jobs: tuple[Name, ...] | None = Field(None, min_length=1, max_length=100, description="All pairs of these jobs")
    model: Name | None = Field(None, description="The model to train. null = the model that sampled the bases")
    prefer: Literal["adoption", "verdicts"] = Field(
        "adoption",
        description="Preferred side: Eq. 7, or reviewers' verdicts (pairs without a verdict are skipped)",
    )
    training: TrainingConfig = TrainingConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        require_one(self, "pairs", "jobs")
        return self


def check(checker: Checker, spec: TrainingJobSpec) -> Checked[TrainingJobSpec] | None:
    """Check the pairs: their samples must match each other and the model to train."""
    # the pairs
    named = _check_pairs(checker, spec.pairs or ()) + _check_jobs(checker, spec.jobs or ())
    named_pairs = checker.training_sides(spec.pairs or (), spec.jobs or (), spec.prefer == "verdicts")
    if named_pairs is None:
        return None
    pairs, sides = named_pairs
    if named and not pairs:
        checker.wrong("/prefer", "expected pairs with a verdict for one side, got none", "no_pairs")
    if not pairs:
        return None

    # the samples and the model
    source = "/jobs" if spec.pairs is None else "/pairs"
    if not all(side.has_trajectory for side in sides):
        checker.wrong(source, "the trajectories of some samples were not kept", "trajectory_gone")
    if spec.model is not None:
        model, _ = checker.model("/model", spec.model)
    else:
        base_models = {side.model_id for side in sides if side.is_base}
        model = checker.one_model(source, base_models, "; or set `model`, the model to train")
    checker.one_base(source, {side.model_id for side in sides}, model)

    # the settings of sampling and training
    samplings = checker.samplings({side.job_id for side in sides if not side.is_target})
    checker.continues(model, spec.training)
    checker.one_sampling(source, samplings.values())
    if spec.prefer == "verdicts":
        checker.learns_from_verdicts("/prefer", spec.training)
    sizes = Sizes(checker.shard_prompts, pairs=pairs, sampling=next(iter(samplings.values())))
    return Checked(spec, sizes, model)


def _check_pairs(checker: Checker, pair_ids: Sequence[str]) -> int:
    """Report pairs that are unknown, unsuitable or repeated. Returns the number of the others."""
    verified = checker.verified_pairs(pair_ids)
    seen: set[str] = set()
    for n, pair_id in enumerate(pair_ids):
        if pair_id not in verified:
            checker.unknown(f"/pairs/{n}", IdKind.PAIR, pair_id)
            continue
        if not verified[pair_id]:
            checker.wrong(f"/pairs/{n}", f"{pair_id} is not complete yet", "unsuitable_pair")
        if pair_id in seen:
            checker.wrong(f"/pairs/{n}", "expected each pair once", "invalid_request")
        seen.add(pair_id)
    return len(seen)


def _check_jobs(checker: Checker, job_ids: Sequence[str]) -> int:
    """Report jobs that are unknown, without pairs or repeated. Returns the number of the others."""
    existing = checker.existing_jobs(job_ids)
    with_pairs = checker.jobs_with_pairs(job_ids)
    seen: set[str] = set()
    for n, job_id in enumerate(job_ids):
        if job_id not in existing:
            checker.unknown(f"/jobs/{n}", IdKind.JOB, job_id)
        elif job_id not in with_pairs:
            checker.wrong(f"/jobs/{n}", f"{job_id} has no pairs", "no_pairs")
        elif job_id in seen:
            checker.wrong(f"/jobs/{n}", "expected each job once", "invalid_request")
        else:
            seen.add(job_id)
    return len(seen)


def count(spec: TrainingJobSpec, sizes: Sizes) -> WorkCounts:
    """The work of the training: every pair in each inner epoch."""
    return WorkCounts(training_at_most=sizes.pairs * rows_per_pair(spec.training, sizes.sampling))


def totals(spec: TrainingJobSpec, sizes: Sizes) -> Totals:
    """The stages of `plan`."""
    return {StageKind.TRAIN: StageTotals(1, _work(spec, sizes))}


def plan(spec: TrainingJobSpec, sizes: Sizes) -> list[PlannedStage]:
    """One training stage."""
    return [PlannedStage(StageKind.TRAIN, 1, _work(spec, sizes))]


def _work(spec: TrainingJobSpec, sizes: Sizes) -> int:
    return sizes.pairs * rows_per_pair(spec.training, sizes.sampling, BACKWARD_WORK)


def reads(spec: TrainingJobSpec) -> TrajectoriesRead:
    """The trajectories of the pairs, or of the jobs whose pairs these are.

    The pairs of the jobs are not looked up: a job can have more of them than a request can name.
    """
    return TrajectoriesRead(pairs=spec.pairs or (), jobs=spec.jobs or ())


KIND = Kind(
    name=JobKind.TRAINING,
    path="/trainings",
    operation="start_training",
    description="Train on stored pairs, including pairs with verdicts.",
    spec=TrainingJobSpec,
    check=check,
    count=count,
    totals=totals,
    plan=plan,
    reads=reads,
    examples={
        "jobs": {
            "summary": "All pairs of a job",
            "value": {"jobs": [EXAMPLE_JOB], "training": {"learning_rate": 0.0003}},
        },
        "pairs": {"summary": "A few pairs", "value": {"pairs": [EXAMPLE_PAIR], "seed": 3}},
    },
)
