"""The stages of a job: their dependencies and their work. Each kind of job (`service.jobs.kinds`) has its own plan."""

from __future__ import annotations

from service.jobs.kinds import JobSpec, kind_of
from service.plan import PlannedStage, Sizes, Totals, WorkCounts


def count(spec: JobSpec, sizes: Sizes) -> WorkCounts:
    """Images and U-Net evaluations of the whole job."""
    return kind_of(spec).count(spec, sizes)


def totals(spec: JobSpec, sizes: Sizes) -> Totals:
    """The stages of all rounds by kind, in closed form."""
    return kind_of(spec).totals(spec, sizes)


def rounds_of(spec: JobSpec) -> int:
    """The number of rounds of the job; 0 for kinds without rounds."""
    return kind_of(spec).rounds(spec)


def plan_start(spec: JobSpec, sizes: Sizes) -> list[PlannedStage]:
    """The first stages of the job: all stages, or for a round job those until the end of the first round."""
    return kind_of(spec).plan(spec, sizes)


def plan_round(spec: JobSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The stages of one round; empty for kinds without rounds."""
    return kind_of(spec).plan_round(spec, round_number, sizes)


def total_work(spec: JobSpec, sizes: Sizes) -> float:
    """The work of all stages of all rounds, in U-Net evaluations."""
    return sum(stages.work for stages in totals(spec, sizes).values())
