"""Invariants that hold after any fault, checked in database, storage and logs (I1 to I7 of the durability design).

I1 every accepted job (2xx) has ended, and there are no other jobs
I2 one row for each (stage, slot), one success for each stage, and every object has its row's bytes
I3 pairs: all, distinct and expected are the same number; the jobs' own counts agree
I4 nothing was written under a lease that was over
I5 the adapter is that of an undisturbed run
I6 after a collection the objects are those of the rows
I7 no secret in a log, an error or an event
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from sqlalchemy import func, select

from service.db.tables import Artifact, Event, Job, Model, Pair, Sample, Stage, StageDependency
from service.jobs.collector import collect
from service.service import Service
from service.states import FINAL_JOB_STATES, StageKind, StageState

_IS_KEPT = Job.deleted_at.is_(None)
"""The rows of deleted jobs are removed step by step."""
_ENDS = tuple(f"stage.{how}" for how in ("succeeded", "given_back", "retried", "failed", "paused", "cancelled"))


def check(service: Service, accepted: Collection[str], log: str, secrets: Iterable[str]) -> None:
    """Check I1 to I4, I6 and I7. No stage may be running. Collects garbage first."""
    all_jobs_have_ended(service, accepted)
    objects_are_those_of_their_rows(service)
    counts_agree(service)
    leases_were_kept(service)
    nothing_is_left_over(service)
    no_secret_is_seen(service, log, secrets)


def all_jobs_have_ended(service: Service, accepted: Collection[str]) -> None:
    """I1, except for jobs that were deleted."""
    with service.uow.reading() as session:
        states = {job.id: job.state for job in session.scalars(select(Job).where(_IS_KEPT))}
        open_stages = session.scalars(select(Stage.state).where(Stage.state.in_(("running", "queued", "held")))).all()
    assert set(states) == set(accepted)
    assert {job_id: state for job_id, state in states.items() if state not in FINAL_JOB_STATES} == {}
    assert open_stages == []


def objects_are_those_of_their_rows(service: Service) -> None:
    """I2."""
    with service.uow.reading() as session:
        rows = session.scalars(select(Artifact)).all()
        done = select(Stage.id).where(Stage.state == StageState.SUCCEEDED, Stage.kind != StageKind.REVIEW)
        succeeded = set(session.scalars(done.join(Job).where(_IS_KEPT)))  # people, not workers, end reviews
        ends = select(Event.stage_id).join(Job).where(Event.kind == "stage.succeeded", _IS_KEPT)
        successes = Counter(session.scalars(ends))
    assert len({(row.stage_id, row.slot) for row in rows}) == len(rows)
    assert set(successes) == succeeded and set(successes.values()) <= {1}
    for row in rows:
        content = b"".join(service.store.read(row.key, 0, row.size_bytes))
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (row.sha256, row.size_bytes), row.key


def counts_agree(service: Service) -> None:
    """I3, without the expected number of pairs, which `expect_pairs` checks."""
    with service.uow.reading() as session:
        kept = session.scalars(select(Job).where(_IS_KEPT)).all()
        counts = {job.id: (job.samples_made, job.pairs_made, job.models_made) for job in kept}
        stored = {job.id: job.storage_bytes for job in kept}
        for job_id, counted in counts.items():
            tables = (Sample, Pair, Model)
            rows = tuple(session.scalar(select(func.count()).where(table.job_id == job_id)) for table in tables)
            assert counted == rows, job_id
            size = select(func.coalesce(func.sum(Artifact.size_bytes), 0)).where(Artifact.job_id == job_id)
            checkpoints = select(func.coalesce(func.sum(Stage.checkpoint_bytes), 0)).where(Stage.job_id == job_id)
            assert stored[job_id] == session.scalars(size).one() + session.scalars(checkpoints).one(), job_id
        own = select(Sample.job_id, Sample.round, Sample.split, Sample.prompt_index, Sample.number, Sample.model_id)
        sampled = session.execute(own.where(Sample.role != "target")).all()
    assert len(set(sampled)) == len(sampled)


def expect_pairs(service: Service, job_id: str, expected: int) -> None:
    """I3."""
    with service.uow.reading() as session:
        pairs = session.scalars(select(Pair).where(Pair.job_id == job_id)).all()
    distinct = {(pair.round, pair.reference_id, pair.base_id, pair.target_id) for pair in pairs}
    assert (len(pairs), len(distinct)) == (expected, expected)


def leases_were_kept(service: Service) -> None:
    """I4: the attempts of a stage do not overlap, and its outputs were written by its last attempt, which succeeded.

    This does not detect late writes after that attempt: `test_faults` compares rows.
    """
    with service.uow.reading() as session:
        stages = {stage.id: stage for stage in session.scalars(select(Stage).join(Job).where(_IS_KEPT))}
        kinds = defaultdict(list)
        for event in session.scalars(select(Event).where(Event.stage_id.is_not(None)).order_by(Event.id)):
            kinds[event.stage_id].append(event.kind)
        unmet = select(StageDependency.stage_id, func.count()).join(Stage, Stage.id == StageDependency.needs_id)
        unmet = unmet.where(Stage.state != StageState.SUCCEEDED).group_by(StageDependency.stage_id)
        waiting: dict[str, int] = {row[0]: row[1] for row in session.execute(unmet)}
        paused = set(session.scalars(select(Event.job_id).where(Event.kind == "job.pause_requested")))
        written = [
            (row.stage_id, row.created_at)
            for table in (Artifact, Sample, Pair, Model)
            for row in session.scalars(select(table).join(Job, Job.id == table.job_id).where(_IS_KEPT))
            if row.stage_id is not None
        ]
    for stage_id, stage in stages.items():
        of_stage = kinds[stage_id]
        assert of_stage.count("stage.started") == stage.lease_epoch, (stage.kind, of_stage)
        assert stage.unmet == waiting.get(stage_id, 0), stage.kind
        running = False
        for kind in of_stage:
            if kind == "stage.started":
                assert not running or stage.job_id in paused, of_stage  # a pause ends an attempt without an event
            assert running or not kind.startswith("training."), of_stage
            running = kind not in _ENDS and (running or kind == "stage.started")
        assert not running, of_stage
    for stage_id, at in written:
        assert stages[stage_id].state == StageState.SUCCEEDED
        assert at >= (stages[stage_id].started_at or 0), stages[stage_id].kind


def nothing_is_left_over(service: Service) -> None:
    """I6."""
    at_once = service.settings.model_copy(update={"collect_after_seconds": 1e-9})
    collect(service.uow, service.store, at_once)
    with service.uow.reading() as session:
        rows = set(session.scalars(select(Artifact.key)))
    assert {stored.key for stored in service.store.objects()} == rows


def no_secret_is_seen(service: Service, log: str, secrets: Iterable[str]) -> None:
    """I7."""
    with service.uow.reading() as session:
        events = session.execute(select(Event.message, Event.data)).all()
        errors = session.execute(select(Job.error_message, Job.spec)).all()
        stages = session.execute(select(Stage.error_message)).all()
    seen = [("logs", log), ("events", str(events)), ("jobs", str(errors)), ("stages", str(stages))]
    leaks = [(place, secret[:6]) for place, text in seen for secret in secrets if secret in text]
    assert leaks == []


def adapter_sha256(service: Service, job_id: str) -> str:
    """I5: return the adapter's SHA-256, to compare with that of an undisturbed run."""
    with service.uow.reading() as session:
        query = select(Artifact.sha256).join(Model, Model.adapter_artifact_id == Artifact.id)
        return str(session.scalars(query.where(Model.job_id == job_id).order_by(Model.round.desc())).first())
