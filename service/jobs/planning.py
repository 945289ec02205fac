"""From a spec to stages: what a job consists of, what waits for what, and how much work each stage is.

What is planned is said by the kind of job (`service.jobs.kinds`).
"""

from __future__ import annotations

from service.jobs.kinds import JobSpec, kind_of
from service.plan import PlannedStage, Sizes, WorkCounts


def count(spec: JobSpec, sizes: Sizes) -> WorkCounts:
    """What the whole job takes."""
    return kind_of(spec).count(spec, sizes)


def rounds_of(spec: JobSpec) -> int:
    """How many rounds the job has; 0 where its kind has none."""
    return kind_of(spec).rounds(spec)


def plan_start(spec: JobSpec, sizes: Sizes) -> list[PlannedStage]:
    """The job's first stages: all of them, but for rounds only those up to the first round's end."""
    return kind_of(spec).plan(spec, sizes)


def plan_round(spec: JobSpec, round_number: int, sizes: Sizes) -> list[PlannedStage]:
    """The stages of one round; none where the kind has no rounds."""
    return kind_of(spec).plan_round(spec, round_number, sizes)


def total_work(spec: JobSpec, sizes: Sizes) -> float:
    """The work of all stages of all rounds."""
    work = sum(stage.work for stage in plan_start(spec, sizes))
    for number in range(2, rounds_of(spec) + 1):
        work += sum(stage.work for stage in plan_round(spec, number, sizes))
    return work
