"""Deletion of jobs: what is removed, in which steps, and what keeps a job; on SQLite and PostgreSQL."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, inspect, select, update

from dfusion.prompts import Prompt
from service import service as operations
from service.db.clock import now_seconds
from service.db.queries import deletion, jobs, results
from service.db.tables import (
    Artifact,
    Event,
    IdempotencyKey,
    Job,
    JobPromptSet,
    JobSource,
    Metric,
    Model,
    Pair,
    PairVerdict,
    PromptSet,
    Sample,
    Score,
    Stage,
    StageDependency,
    Table,
)
from service.errors import (
    ConflictError,
    InvalidRequestError,
    JobInUseError,
    NotFoundError,
    PromptSetInUseError,
    StorageError,
    TransferError,
)
from service.ids import IdKind, new_id
from service.jobs import collector, execution
from service.jobs.collector import Collector, collect
from service.jobs.execution import StageFailure
from service.jobs.kinds import EvaluationJobSpec, ExportJobSpec, JobSpec, RoundSpec, SamplingJobSpec
from service.maintenance import maintain
from service.service import (
    Service,
    cancel_job,
    continue_job,
    create_job,
    delete_job,
    delete_prompt_set,
    retry_job,
    save_prompt_set,
    set_alias,
)
from service.transfer.exporting import export_project
from service.transfer.importing import import_project
from tests.service import PROMPTS, round_body, settings_for
from tests.stored_pairs import Results

DAY = 86_400.0
OWNED = (Artifact, Event, JobPromptSet, JobSource, Metric, Model, Pair, Sample, Stage)
"""The tables of rows that the filled job has."""


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    opened = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=database_url))
    yield opened
    opened.close()


@dataclass(frozen=True)
class Filled:
    """A cancelled round job with rows in each table, and one of its pairs and models."""

    id: str
    pair_id: str
    model_id: str


def fill(service: Service, model: str = "tiny") -> Filled:
    """Create a round job on this model, store two images, a pair and two models, and cancel it."""
    spec = RoundSpec.model_validate(round_body(model=model, evaluation=None, rounds=2))
    job_id = create_job(service, spec, key=new_id(IdKind.JOB))
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None and held.job_id == job_id
    with service.uow.reading() as session:
        start = results.find_model(session, model)
    assert start is not None

    # 1. the files and rows
    rows = Results(job_id, held.stage_id, start.id)
    files = []
    for slot in ("image-0", "image-1", "adapter-1", "adapter-2"):
        with service.store.scratch() as scratch:
            (scratch / "file").write_text(slot)
            stored = service.store.put(job_id, held.stage_id, slot, scratch / "file")
        files.append(rows.artifact(slot, key=stored.key, sha256=stored.sha256, size_bytes=stored.size_bytes))
    samples = [rows.sample(number, file) for number, file in enumerate(files[:2])]
    scores = [Score(sample_id=sample.id, scorer="brightness", version="1", value=0.5) for sample in samples]
    pair = rows.pair(0, samples[0].id, samples[1].id, target_id=samples[0].id, adopted=True, verdict="target")
    verdict = PairVerdict(pair_id=pair.id, reviewer="ann", prefer="target", revision=1, created_at=now_seconds())
    models: list[Model] = []
    for number, file in enumerate(files[2:], 1):
        parent = models[-1].id if models else start.id
        common = {"job_id": job_id, "stage_id": held.stage_id, "statistics": {}, "created_at": now_seconds()}
        row = Model(
            id=f"mdl_{9 - number}{new_id(IdKind.MODEL)[5:]}",  # a later model may have a smaller id
            base="tiny",
            parent_id=parent,
            round=number,
            adapter_artifact_id=file.id,
            **common,
        )
        models.append(row)
    metric = Metric(
        job_id=job_id,
        round=1,
        split="train",
        scorer="brightness",
        model_id=models[0].id,
        version="1",
        count=1,
        mean=0.5,
        std=0.0,
        created_at=now_seconds(),
    )

    # 2. the end of the job
    parts: list[list[Table]] = [[*files], [*samples], [*scores, pair, verdict], [models[0]], [models[1]], [metric]]

    def record(session: Any) -> None:
        for part in parts:
            results.add_all(session, part)

    execution.finish(service.uow, service.settings, held, record)
    cancel_job(service, job_id)
    return Filled(job_id, pair.id, models[-1].id)


def rows_left(service: Service, job_id: str) -> dict[str, int]:
    """The numbers of rows of the job, by table."""
    with service.uow.reading() as session:
        counts = {t.__tablename__: session.scalar(select(func.count()).where(t.job_id == job_id)) or 0 for t in OWNED}
        counts["jobs"] = session.scalar(select(func.count()).where(Job.id == job_id)) or 0
    return {name: count for name, count in counts.items() if count}


def keys(service: Service) -> set[str]:
    return {stored.key for stored in service.store.objects()}


def collected(service: Service, **changes: Any) -> collector.Collected:
    return collect(service.uow, service.store, service.settings.model_copy(update=changes))


def age(service: Service, *job_ids: str, days: float = 2) -> None:
    """Let the jobs have ended, and been deleted, this long ago."""
    with service.uow.writing() as session:
        values = {name: getattr(Job, name) - days * DAY for name in ("finished_at", "deleted_at", "purge_at")}
        session.execute(update(Job).where(Job.id.in_(job_ids)).values(values))


def test_a_deleted_job_is_removed_with_all_that_it_made(service: Service) -> None:
    """Its stages and its own row a day later, since a lost worker may still write objects until then."""
    kept = fill(service)
    job = fill(service)
    assert set(rows_left(service, job.id)) == {t.__tablename__ for t in OWNED if t is not JobSource} | {"jobs"}
    stages = rows_left(service, job.id)["stages"]

    delete_job(service, job.id)
    assert collected(service).objects == 4
    assert rows_left(service, job.id) == {"stages": stages, "jobs": 1}
    assert {key.split("/")[1] for key in keys(service)} == {kept.id}
    assert not (service.settings.data_dir / "artifacts" / "jobs" / job.id).exists()  # also no empty folders

    with service.uow.reading() as session:
        stage_id = session.scalars(select(Stage.id).where(Stage.job_id == job.id).limit(1)).one()
    late = service.store.put(job.id, stage_id, "late", Path(__file__))
    assert collected(service).objects == 0  # not due yet
    age(service, job.id)
    assert collected(service).objects == 1
    assert late.key not in keys(service)
    assert rows_left(service, job.id) == {}
    with service.uow.reading() as session:
        tables = (Score, Sample, StageDependency)
        of_kept = [session.scalar(select(func.count()).select_from(table)) for table in tables]
    assert of_kept[:2] == [2, 2] and of_kept[2]
    assert rows_left(service, kept.id)["pairs"] == 1 and len(keys(service)) == 4


class FailingStore:
    """A store of which each second removal fails."""

    def __init__(self, service: Service) -> None:
        self._store = service.store
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def remove(self, key: str) -> None:
        self._calls += 1
        if self._calls % 2 == 0:
            raise StorageError("cannot remove")
        self._store.remove(key)


def test_a_removal_continues_after_each_batch_and_each_failure(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a SIGKILL: each run has another collector, which remembers nothing."""
    monkeypatch.setattr(collector, "_ROWS", 1)
    job = fill(service)
    delete_job(service, job.id)
    age(service, job.id)
    store: Any = FailingStore(service)
    failures = 0
    for _ in range(200):
        runs = Collector(service.uow, store, service.settings)
        runs._unfinished.append("deleted_jobs")  # a batch of this task
        try:
            runs.run(seconds=0)
        except StorageError:
            failures += 1
        if not rows_left(service, job.id):
            break
    assert (rows_left(service, job.id), keys(service)) == ({}, set())
    assert failures > 0


def test_only_jobs_that_have_ended_and_that_nothing_uses_are_deleted(service: Service) -> None:
    queued = create_job(service, RoundSpec.model_validate(round_body()))
    with pytest.raises(ConflictError, match="is queued: only a job that has ended can be deleted; cancel it first"):
        delete_job(service, queued)
    cancel_job(service, queued)

    source = fill(service)
    tuned = fill(service, source.model_id)
    prompts = [{"text": prompt["text"]} for prompt in PROMPTS]
    compared = EvaluationJobSpec.model_validate(
        {"models": ["tiny", tuned.model_id], "prompts": prompts, "scorers": ["brightness"], "label": queued}
    )
    evaluation = create_job(service, compared)
    set_alias(service, "champion", tuned.model_id)
    with pytest.raises(JobInUseError, match=f"{source.id} is used by {tuned.id}: delete these first"):
        delete_job(service, source.id)
    with pytest.raises(JobInUseError) as error:
        delete_job(service, tuned.id)
    assert [problem.message for problem in error.value.problems] == [
        f"used by {evaluation}",
        "used by the alias champion",
    ]

    delete_job(service, queued)  # a label is no use
    cancel_job(service, evaluation)
    with service.uow.writing() as session:
        results.remove_alias(session, "champion")
    for job_id in (evaluation, tuned.id, source.id):
        delete_job(service, job_id)
    with pytest.raises(NotFoundError):
        delete_job(service, source.id)

    # rows of `tuned` reference models of `source`, which therefore goes last, whatever the order of the deletions
    age(service, source.id, days=3)
    age(service, tuned.id, evaluation, queued)
    collected(service)
    collected(service)
    assert [rows_left(service, job_id) for job_id in (source.id, tuned.id, evaluation, queued)] == [{}] * 4
    assert keys(service) == set()


def test_a_request_uses_the_jobs_of_the_ids_in_it(service: Service) -> None:
    job, other = fill(service), fill(service)
    export = create_job(service, ExportJobSpec.model_validate({"job": job.id, "format": "parquet"}))
    with service.uow.reading() as session:
        assert deletion.users(session, job.id, 9) == [export]
        sample_id = session.scalars(select(Sample.id).where(Sample.job_id == other.id).limit(1)).one()
        for named in (job.id, job.pair_id, job.model_id):
            assert jobs.owners(session, {named, sample_id}) == {job.id, other.id}


def test_a_request_whose_source_is_deleted_after_its_check_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(service)
    spec = SamplingJobSpec.model_validate({"model": source.model_id, "prompts": [{"text": "a red circle"}]})
    check = operations._check

    def check_then_delete(*arguments: Any) -> Any:
        checked = check(*arguments)
        delete_job(service, source.id)
        monkeypatch.setattr(operations, "_check", check)
        return checked

    monkeypatch.setattr(operations, "_check", check_then_delete)
    with pytest.raises(InvalidRequestError, match="unknown model"):
        create_job(service, spec)
    with service.uow.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1


def save_set(service: Service, texts: list[str]) -> str:
    """Save prompts as the newest version of the prompt set `pets`. Returns its id."""
    return save_prompt_set(service, "pets", "", [Prompt(text=text) for text in texts])[0].id


def sets_left(service: Service) -> set[str]:
    """The ids of all prompt sets but the built-in ones."""
    with service.uow.reading() as session:
        return set(session.scalars(select(PromptSet.id).where(~PromptSet.builtin)))


def using(pets: str) -> list[tuple[JobSpec, str]]:
    """A request of each form that uses the prompt set `pets`, given by this name or id."""
    sampling: dict[str, Any] = {"model": "tiny", "prompt_set": pets}
    held_out = round_body(held_out_prompt_set=pets, evaluation=None)
    evaluation = {"models": ["tiny"], "prompt_sets": [pets], "scorers": ["brightness"]}
    return [
        (SamplingJobSpec.model_validate(sampling), "/prompt_set"),
        (RoundSpec.model_validate(held_out), "/held_out_prompt_set"),
        (EvaluationJobSpec.model_validate(evaluation), "/prompt_sets/0"),
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_prompt_set_is_deleted_when_no_job_uses_it(service: Service, number: int) -> None:
    """A name stands for all versions. A deleted job uses nothing, also before its rows are removed."""
    first, second = save_set(service, ["a cat"]), save_set(service, ["a dog"])
    spec, pointer = using("pets")[number]
    job_id = create_job(service, spec)
    for name in ("pets", second):
        with pytest.raises(PromptSetInUseError, match=f"{name} is used by {job_id}: delete these first"):
            delete_prompt_set(service, name)
    delete_prompt_set(service, first)
    assert first not in sets_left(service)

    cancel_job(service, job_id)
    delete_job(service, job_id)
    delete_prompt_set(service, "pets")
    with pytest.raises(NotFoundError, match="there is no prompt set 'pets'"):
        delete_prompt_set(service, "pets")
    with pytest.raises(InvalidRequestError) as error:
        create_job(service, spec)
    assert [problem.pointer for problem in error.value.problems] == [pointer]

    collected(service)
    assert sets_left(service) == set()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_prompts_of_a_job_are_removed_with_the_last_job_that_uses_them(service: Service, number: int) -> None:
    """Another job can name them by their id."""
    evaluation = {"models": ["tiny"], "prompts": [{"text": "a red circle"}], "scorers": ["brightness"]}
    for spec in (RoundSpec.model_validate(round_body()), EvaluationJobSpec.model_validate(evaluation)):
        own = create_job(service, spec)
        [set_id] = sets_left(service)
        other = create_job(service, using(set_id)[number][0])
        for job_id in (own, other):
            cancel_job(service, job_id)

        delete_job(service, own)
        collected(service)
        assert set_id in sets_left(service)
        delete_job(service, other)
        collected(service)
        assert sets_left(service) == set()


def test_built_in_lists_are_not_deleted(service: Service) -> None:
    with pytest.raises(ConflictError, match="shapes-attribute-train is a built-in prompt list"):
        delete_prompt_set(service, "shapes-attribute-train")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_request_whose_prompt_set_is_deleted_after_its_check_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_set(service, ["a cat"])
    check = operations._check

    def check_then_delete(*arguments: Any) -> Any:
        monkeypatch.setattr(operations, "_check", check)
        checked = check(*arguments)
        delete_prompt_set(service, "pets")
        return checked

    monkeypatch.setattr(operations, "_check", check_then_delete)
    with pytest.raises(InvalidRequestError, match="unknown prompt set"):
        create_job(service, using("pets")[number][0])


def test_a_retry_remains_without_its_origin(service: Service) -> None:
    origin = create_job(service, RoundSpec.model_validate(round_body()))
    cancel_job(service, origin)
    retry = retry_job(service, origin)
    delete_job(service, origin)
    with service.uow.reading() as session:
        assert jobs.get(session, retry).origin_id is None
    for operation in (retry_job, continue_job):
        with pytest.raises(NotFoundError):
            operation(service, origin)


def test_old_jobs_are_deleted_by_state_unless_they_are_used(service: Service) -> None:
    source = fill(service)
    user = fill(service, source.model_id)
    young, failed = (create_job(service, RoundSpec.model_validate(round_body())) for _ in range(2))
    cancel_job(service, young)
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None and held.job_id == failed
    execution.fail(service.uow, service.settings, held, StageFailure("non_finite", "nan", retryable=False))
    age(service, source.id, user.id, failed, days=10)

    assert collected(service).expired_jobs == 0  # by default, everything is kept
    assert collected(service, retain_cancelled_days=11.0).expired_jobs == 0
    assert collected(service, retain_cancelled_days=9.0).expired_jobs == 1  # `user`, which uses `source`
    assert collected(service, retain_cancelled_days=9.0).expired_jobs == 1
    with service.uow.reading() as session:
        left = jobs.existing(session, [source.id, user.id, young, failed])
    assert left == {young, failed}
    assert collected(service, retain_failed_days=9.0).expired_jobs == 1


def test_old_events_of_ended_jobs_are_removed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_ROWS", 2)
    ended, running = fill(service), create_job(service, RoundSpec.model_validate(round_body()))
    age(service, ended.id, days=3)
    events = rows_left(service, ended.id)["events"]
    assert events > 2
    assert collected(service).events == 0
    assert collected(service, retain_events_days=4.0).events == 0
    assert collected(service, retain_events_days=2.0).events == events
    assert "events" not in rows_left(service, ended.id) and rows_left(service, running)["events"] == 1
    assert collected(service, retain_events_days=2.0).events == 0


def test_an_idempotency_key_expires(service: Service) -> None:
    spec = RoundSpec.model_validate(round_body())
    first = create_job(service, spec, key="key")
    assert create_job(service, spec, key="key") == first
    with service.uow.writing() as session:
        session.execute(update(IdempotencyKey).values(created_at=IdempotencyKey.created_at - 89 * DAY))
    assert collected(service).keys == 0
    with service.uow.writing() as session:
        session.execute(update(IdempotencyKey).values(created_at=IdempotencyKey.created_at - 2 * DAY))
    assert collected(service, retain_idempotency_keys_days=0.0).keys == 0
    assert collected(service).keys == 1
    second = create_job(service, spec, key="key")
    assert second != first

    cancel_job(service, second)
    delete_job(service, second)
    assert create_job(service, spec, key="key") not in (first, second)  # the key of a deleted job is free at once


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_deleted_job_is_neither_exported_nor_imported_again(service: Service, tmp_path: Path) -> None:
    job, kept = fill(service), fill(service)
    both = export_project(service, tmp_path / "both.tar")
    delete_job(service, job.id)
    one = export_project(service, tmp_path / "one.tar")
    assert (both.jobs, one.jobs) == (2, 1)
    assert both.objects == one.objects == 4  # the jobs have equal files
    with pytest.raises(NotFoundError):
        export_project(service, tmp_path / "none.tar", [job.id])

    with pytest.raises(TransferError, match=f"{job.id} was deleted here, and its rows are not removed yet"):
        import_project(service, tmp_path / "both.tar")
    age(service, job.id)
    collected(service)
    assert import_project(service, tmp_path / "both.tar").jobs == 1
    assert rows_left(service, job.id) == rows_left(service, kept.id)
    with service.uow.reading() as session:
        assert jobs.get(session, job.id).storage_bytes == jobs.get(session, kept.id).storage_bytes > 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_removal_of_a_deleted_job_starts_before_the_next_collection_is_due(service: Service) -> None:
    """Collections are an hour apart by default."""
    assert service.settings.collect_seconds == 3600
    job = fill(service)
    stop = threading.Event()
    thread = threading.Thread(target=maintain, args=(service, stop))
    thread.start()
    try:
        time.sleep(0.3)  # the first collection has nothing to do
        delete_job(service, job.id)
        deadline = time.monotonic() + 30
        while keys(service) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert keys(service) == set()
    finally:
        stop.set()
        thread.join(30)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_each_table_of_rows_of_jobs_is_removed_before_those_that_it_references(service: Service) -> None:
    """A new table with a reference to jobs or their rows is added to CONTENTS."""
    kept = {
        "scores",
        "pair_verdicts",
        "stage_dependencies",
        "stages",
        "jobs",
        "prompt_sets",
        "api_keys",
        "workers",
        "model_aliases",
    }
    kept |= {"webhooks", "webhook_deliveries", "browser_sessions"}
    kept |= {"preference_tests", "preference_questions", "preference_answers"}  # they prevent the deletion of their job
    names = [table.name for table in deletion.CONTENTS]
    assert kept.isdisjoint(names) and kept.union(names) == set(Table.metadata.tables)
    inspector = inspect(service.uow.engine)
    for position, name in enumerate(names):
        referenced = {key["referred_table"] for key in inspector.get_foreign_keys(name)} - {name}
        assert referenced.isdisjoint(names[:position]), name
