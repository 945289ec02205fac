"""Further rounds for a round job that has succeeded. Its models, optimiser and scores are those of its last round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.catalogue import Catalogue
from service.db.queries import jobs, stages
from service.db.tables import Job
from service.errors import ConflictError, InvalidRequestError
from service.jobs.checking import Checker, raise_problems
from service.jobs.execution import add_stages, round_sizes
from service.jobs.kinds import RoundSpec, spec_of
from service.jobs.kinds.base import Checked
from service.jobs.kinds.rounds import StopWhen, plan_round, totals_after
from service.plan import PlannedStage
from service.settings import Settings
from service.states import JobKind, JobState


@dataclass(frozen=True)
class Extension:
    """Further rounds of a job, planned before the transaction that adds them.

    Attributes:
        rounds: The number of rounds of the job so far.
        spec: Its request with the new number, as JSON.
        work: The work of the further rounds, in U-Net evaluations.
        stages: The stages of the first further round.
    """

    rounds: int
    spec: dict[str, Any]
    work: float
    stages: Sequence[PlannedStage]


def plan_extension(
    session: Session,
    settings: Settings,
    catalogue: Catalogue,
    job_id: str,
    rounds: int,
    stop_when: StopWhen | None = None,
) -> Extension | None:
    """Check that the job can have this number of rounds in total, and plan the further ones.

    Returns:
        The further rounds; None if the job has this number already.

    Raises:
        NotFoundError: No such job exists.
        ConflictError: It is no round job, or has not succeeded.
        InvalidRequestError: It has more rounds, or would exceed the limits of the settings.
    """
    # 1. the state of the job
    job = jobs.get(session, job_id)
    if job.kind != JobKind.ROUND:
        raise ConflictError(f"{job.id} is a {job.kind} job: only round jobs have rounds")
    if not _has_fewer_rounds(job, rounds):
        return None

    # 2. the limits, which apply to all rounds together
    new_spec = job.spec | {"rounds": rounds}
    if stop_when is not None:
        new_spec["stop_when"] = list(stop_when)
    spec = spec_of(job.kind, new_spec)
    if not isinstance(spec, RoundSpec):
        raise TypeError(f"expected the request of a round job, got {type(spec).__name__}")
    sizes = round_sizes(session, settings, job)
    checker = Checker(catalogue, settings, session)
    checker.limit_job(Checked(spec, sizes))
    raise_problems(checker)

    # 3. the further rounds
    work = sum(further.work for further in totals_after(spec, job.rounds, sizes).values())
    return Extension(job.rounds, new_spec, work, plan_round(spec, job.rounds + 1, sizes))


def extend(session: Session, job_id: str, rounds: int, extension: Extension) -> None:
    """Add the further rounds to the job, which runs again. Does nothing if it has this number of rounds already.

    Raises:
        NotFoundError: The job was deleted concurrently.
        ConflictError: The job has changed since the rounds were planned.
        InvalidRequestError: The job has more rounds.
    """
    job = jobs.lock_kept(session, job_id)
    if not _has_fewer_rounds(job, rounds):
        return
    if job.rounds != extension.rounds:
        raise ConflictError(f"the rounds of {job.id} were raised to {job.rounds} by another request: try again")

    jobs.extend(session, job.id, rounds, extension.spec, extension.work)
    message = f"the job continues until round {rounds}"
    jobs.add_event(session, job.id, "job.extended", message, rounds=rounds, before=extension.rounds)
    add_stages(session, job.id, extension.stages, stages.last_number(session, job.id))


def _has_fewer_rounds(job: Job, rounds: int) -> bool:
    """Whether the job has fewer rounds and can get more. Raises ConflictError or InvalidRequestError if it cannot."""
    if rounds == job.rounds:
        return False
    if rounds < job.rounds:
        raise InvalidRequestError.at("/rounds", f"expected at least the {job.rounds} rounds of the job, got {rounds}")
    if job.state != JobState.SUCCEEDED:
        raise ConflictError(f"{job.id} is {job.state}: only the rounds of a job that has succeeded can be raised")
    return True
