"""Garbage collection of objects, on files and on a real S3 server."""

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service import maintenance
from service.db.clock import now_seconds
from service.db.locks import AdvisoryLock
from service.db.queries import jobs, results, stages
from service.db.tables import Artifact, Pair, Sample, Stage
from service.errors import StorageError
from service.jobs import collector, execution
from service.jobs.collector import Collected, Collector, collect, remove_all_leftovers
from service.jobs.execution import Claim, StageFailure
from service.jobs.kinds import RoundSpec
from service.jobs.sources import trajectory_sources
from service.maintenance import maintain
from service.service import Service, cancel_job, create_job
from service.states import JobKind, JobState
from service.storage import ListedObject, Store, StoredObject
from tests.servers import S3Server
from tests.service import round_body, settings_for
from tests.stored_pairs import Results

NOTHING = Collected(objects=0, checkpoints=0, trajectories=0, scratch_folders=0)
DAY = 86_400.0


@dataclass
class Installation:
    """A service without a worker, and the folder of its objects."""

    service: Service
    folder: Path
    server: S3Server | None

    def collect(self, **changes: Any) -> Collected:
        settings = self.service.settings.model_copy(update=changes)
        return collect(self.service.uow, self.service.store, settings)

    def start(self) -> str:
        return create_job(self.service, RoundSpec.model_validate(round_body(evaluation=None)))

    def claim(self) -> Claim:
        held = execution.claim(self.service.uow, self.service.settings, "w")
        assert held is not None
        return held

    def put(self, held: Claim, slot: str) -> StoredObject:
        return self.put_for(held.job_id, held.stage_id, slot)

    def put_for(self, job_id: str, stage_id: str, slot: str) -> StoredObject:
        with self.service.store.scratch() as scratch:
            source = scratch / "source"
            source.write_bytes(f"{stage_id} {slot}".encode())
            return self.service.store.put(job_id, stage_id, slot, source)

    def finish(self, held: Claim, record: Callable[[Session], None] = lambda _session: None) -> None:
        execution.finish(self.service.uow, self.service.settings, held, record)

    def age(self, *keys: str) -> None:
        """Set the age of these objects to two days, as if the stages that have ended so far had ended then."""
        with self.service.uow.writing() as session:
            ended = update(Stage).where(Stage.finished_at > now_seconds() - DAY)
            session.execute(ended.values(finished_at=Stage.finished_at - 2 * DAY))
        for key in keys:
            status = (self.folder / key).stat()
            os.utime(self.folder / key, (status.st_mtime - 2 * DAY, status.st_mtime - 2 * DAY))
        if self.server is not None:
            self.server.clear_cache()

    def with_store(self, store: Store) -> "Installation":
        """The same installation with a wrapper of its store."""
        return replace(self, service=replace(self.service, store=store))

    def collector(self, **changes: Any) -> Collector:
        settings = self.service.settings.model_copy(update=changes)
        return Collector(self.service.uow, self.service.store, settings)

    def keys(self) -> set[str]:
        return {stored.key for stored in self.service.store.objects()}

    def named(self) -> set[str]:
        """Return the object keys that rows refer to."""
        with self.service.uow.reading() as session:
            named = {*session.scalars(select(Artifact.key)), *session.scalars(select(Stage.checkpoint_key))}
        return {key for key in named if key is not None}


class WrappedStore:
    """A store that records the folders that are listed, and fails where a test says so."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.listed: list[str] = []
        self.unlistable = ""
        self.removes = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def objects(self, folder: str = "jobs") -> Iterator[ListedObject]:
        self.listed.append(folder)
        if folder == self.unlistable:
            raise StorageError("cannot list")
        return self._store.objects(folder)

    def remove(self, key: str) -> None:
        if not self.removes:
            raise StorageError("cannot remove")
        self._store.remove(key)


@pytest.fixture(params=["files and sqlite", "s3 and postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    data_dir, server, changes = tmp_path / "data", None, {}
    folder = data_dir / "artifacts"
    if request.param == "s3 and postgresql":
        server = request.getfixturevalue("s3")
        changes = server.settings(f"bucket-{secrets.token_hex(4)}")
        folder = server.folder / changes["s3_bucket"]
        changes["database_url"] = request.getfixturevalue("postgres_url")
    service = Service.open(settings_for(data_dir, tmp_path / "tiny", **changes))
    yield Installation(service, folder, server)
    service.close()


def artifact(held: Claim, slot: str, stored: StoredObject) -> Artifact:
    return Results(held.job_id, held.stage_id).artifact(
        slot, key=stored.key, sha256=stored.sha256, size_bytes=stored.size_bytes
    )


def sample(held: Claim, model_id: str, number: int, trajectory: Artifact, image: Artifact) -> Sample:
    rows = Results(held.job_id, held.stage_id, model_id)
    return rows.sample(number, image, trajectory_artifact_id=trajectory.id, trajectory_row=number)


def pair(held: Claim, reference: str, base: str) -> Pair:
    return Results(held.job_id, held.stage_id).pair(0, reference, base)


def sampled(place: Installation, held: Claim) -> tuple[list[str], str]:
    """Finish a stage with two samples in one trajectory file. Returns the samples' ids and the file's key."""
    files = {slot: artifact(held, slot, place.put(held, slot)) for slot in ("trajectories", "image-0", "image-1")}
    with place.service.uow.reading() as session:
        model_id = jobs.get(session, held.job_id).model_id
    rows = [sample(held, model_id, n, files["trajectories"], files[f"image-{n}"]) for n in (0, 1)]

    place.finish(held, lambda session: results.add_all(session, [*files.values(), *rows]))
    return [row.id for row in rows], files["trajectories"].key


def trajectories(place: Installation, ids: Sequence[str]) -> list[tuple[bool, bool]]:
    """Return for each sample whether it has a trajectory file and a row in it."""
    with place.service.uow.reading() as session:
        samples = [session.get_one(Sample, sample_id) for sample_id in ids]
    return [(row.trajectory_artifact_id is not None, row.trajectory_row is not None) for row in samples]


def two_shards(place: Installation) -> tuple[str, list[str], list[str], list[str]]:
    """Create a job with two finished sampling stages and a pair of the first. Returns samples and file keys."""
    job_id = place.start()
    held = [place.claim(), place.claim()]
    (first, key), (second, other) = (sampled(place, claimed) for claimed in held)
    with place.service.uow.writing() as session:
        session.add(pair(held[0], first[0], first[0]))
    return job_id, first, second, [key, other]


def test_unneeded_trajectories_of_ended_jobs_are_removed(place: Installation) -> None:
    job_id, first, second, files = two_shards(place)
    assert place.collect(keep_trajectories="none") == NOTHING  # the job has not ended
    cancel_job(place.service, job_id)
    before = place.keys()
    assert place.collect(keep_trajectories="all") == NOTHING
    assert place.collect(keep_trajectories="none").trajectories == 2
    assert place.keys() == before - set(files)
    assert place.keys() == place.named()
    assert trajectories(place, first + second) == [(False, False)] * 4
    assert place.collect(keep_trajectories="none") == NOTHING


def add_job(session: Session, kind: JobKind, spec: dict[str, Any]) -> str:
    """Insert a queued job without stages. Returns its id."""
    no_rows = dict.fromkeys(("label", "model_id", "prompt_set_id", "held_out_prompt_set_id", "origin_id", "api_key_id"))
    return jobs.add(session, kind=kind, spec=spec, priority=0, rounds=0, work_total=1, **no_rows).id


def test_a_paused_job_keeps_only_the_trajectories_that_it_may_read(place: Installation) -> None:
    """Those of the job whose pair it trains on, until it ends; those of another job are removed meanwhile."""
    read, samples, _, files_read = two_shards(place)
    cancel_job(place.service, read)
    other, _, _, files_of_other = two_shards(place)
    cancel_job(place.service, other)
    with place.service.uow.writing() as session:
        [pair_id] = session.scalars(select(Pair.id).where(Pair.reference_id == samples[0]))
        training = add_job(session, JobKind.TRAINING, {"pairs": [pair_id]})
        jobs.get(session, training).state = JobState.PAUSED

    collector = place.collector(keep_trajectories="none")
    assert collector.run().trajectories == 2
    assert place.keys().isdisjoint(files_of_other) and place.keys() >= set(files_read)
    assert collector.run().trajectories == 0

    cancel_job(place.service, training)
    assert collector.run().trajectories == 2
    assert place.keys().isdisjoint(files_read)


def test_the_sources_of_a_job_are_those_whose_trajectories_it_may_read(place: Installation) -> None:
    sampled_by, samples, _, _ = two_shards(place)
    with place.service.uow.writing() as session:
        [pair_id] = session.scalars(select(Pair.id).where(Pair.reference_id == samples[0]))
        fusion = {"pairs": [{"reference": samples[0], "base": samples[1]}]}
        fused = add_job(session, JobKind.FUSION, fusion)
        readers = {
            add_job(session, JobKind.FUSION, {"pair": pair_id}): {sampled_by},
            add_job(session, JobKind.FUSION, {"sampling": sampled_by}): {sampled_by},
            fused: {sampled_by},
            add_job(session, JobKind.TRAINING, {"pairs": [pair_id]}): {sampled_by},
            add_job(session, JobKind.TRAINING, {"jobs": [sampled_by]}): {sampled_by},
            add_job(session, JobKind.TRAINING, {"jobs": [fused]}): {fused, sampled_by},
            add_job(session, JobKind.PREVIEW, {"pair": pair_id}): {sampled_by},
            add_job(session, JobKind.PREVIEW, {"samples": samples[:2]}): {sampled_by},
            add_job(session, JobKind.SAMPLING, {"model": "tiny", "prompts": [{"text": "a [cat]"}]}): set(),
        }
        assert {job_id: trajectory_sources(session, job_id) for job_id in readers} == readers


def test_another_setting_is_applied_to_jobs_that_ended_before(place: Installation) -> None:
    job_id, _, _, files = two_shards(place)
    cancel_job(place.service, job_id)
    assert place.collect(keep_trajectories="pairs").trajectories == 1
    assert place.collect(keep_trajectories="pairs").trajectories == 0
    assert place.collect(keep_trajectories="none").trajectories == 1
    assert place.keys().isdisjoint(files)


def storage_bytes(place: Installation, job_id: str) -> int:
    with place.service.uow.reading() as session:
        return jobs.get(session, job_id).storage_bytes


def test_the_bytes_that_a_job_stores(place: Installation) -> None:
    """Its artifacts and the current checkpoint of a stage, until they are removed."""
    job_id, _, _, files = two_shards(place)
    sizes = {stored.key: (place.folder / stored.key).stat().st_size for stored in place.service.store.objects()}
    assert storage_bytes(place, job_id) == sum(sizes.values())

    held = place.claim()
    checkpoints = [place.put(held, slot) for slot in ("checkpoint-1", "checkpoint-second")]
    for stored in checkpoints:
        execution.checkpoint(place.service.uow, place.service.settings, held, stored)
        assert storage_bytes(place, job_id) == sum(sizes.values()) + stored.size_bytes

    place.finish(held)
    cancel_job(place.service, job_id)
    collected = place.collect(keep_trajectories="none")
    assert (collected.checkpoints, collected.trajectories) == (1, 2)
    images = {key: size for key, size in sizes.items() if key not in files}
    assert storage_bytes(place, job_id) == sum(images.values())


def test_a_job_that_runs_and_ends_again_is_collected_again(place: Installation) -> None:
    """Nothing is removed while it runs, neither trajectories nor leftovers."""
    job_id, _, _, files = two_shards(place)
    cancel_job(place.service, job_id)
    assert place.collect(keep_trajectories="pairs").trajectories == 1
    place.age()
    place.collect()
    with place.service.uow.writing() as session:
        again = stages.of_job(session, job_id)[0]
        for row in (jobs.get(session, job_id), again):
            row.state = "running"
            row.finished_at = None
        stage_id = again.id
    leftover = place.put_for(job_id, stage_id, "leftover")
    place.age(leftover.key)
    assert place.collect(keep_trajectories="none") == NOTHING

    with place.service.uow.writing() as session:
        again = session.get_one(Stage, stage_id)
        again.state = "failed"
        again.finished_at = now_seconds()
        assert jobs.end(session, job_id, JobState.FAILED)
    assert place.collect(keep_trajectories="none", collect_after_seconds=1e-9).trajectories == 1
    assert place.keys().isdisjoint({leftover.key, *files})


def test_a_file_stays_whole_if_one_of_its_samples_is_in_a_pair(place: Installation) -> None:
    job_id, first, second, files = two_shards(place)
    cancel_job(place.service, job_id)
    assert place.collect(keep_trajectories="pairs").trajectories == 1
    assert files[0] in place.keys() and files[1] not in place.keys()
    assert trajectories(place, first + second) == [(True, True)] * 2 + [(False, False)] * 2


def test_unreferenced_objects_are_removed_when_old_and_their_stage_has_ended(place: Installation) -> None:
    place.start()
    ended, running = place.claim(), place.claim()
    named = place.put(ended, "named")
    old, young = place.put(ended, "old"), place.put(ended, "young")
    unfinished = place.put(running, "old")
    stranger = place.service.store.put("job_1", "stg_1", "image", Path(__file__))
    place.finish(ended, lambda session: session.add(artifact(ended, "named", named)))
    keys = (named.key, old.key, unfinished.key, stranger.key)
    place.age(*keys)
    assert place.collect() == Collected(objects=1, checkpoints=0, trajectories=0, scratch_folders=0)
    assert place.keys() == {named.key, young.key, unfinished.key, stranger.key}
    place.finish(running)
    assert place.collect() == NOTHING  # it has just ended
    place.age()
    assert place.collect().objects == 1
    assert place.keys() == {named.key, young.key, stranger.key}
    place.age(young.key)
    assert place.collect().objects == 1
    assert place.collect() == NOTHING


def test_checkpoints_go_with_the_end_of_their_stage(place: Installation) -> None:
    place.start()
    held = place.claim()
    replaced, last = place.put(held, "checkpoint-1"), place.put(held, "checkpoint-2")
    for stored in (replaced, last):
        execution.checkpoint(place.service.uow, place.service.settings, held, stored)
    place.age(replaced.key, last.key)
    assert place.collect() == NOTHING
    place.finish(held)
    assert place.collect() == Collected(objects=0, checkpoints=1, trajectories=0, scratch_folders=0)
    place.age()
    assert place.collect() == Collected(objects=1, checkpoints=0, trajectories=0, scratch_folders=0)
    assert place.keys() == set()
    with place.service.uow.reading() as session:
        row = stages.get(session, held.stage_id)
    assert (row.checkpoint_key, row.checkpoint_sha256) == (None, None)
    assert place.collect() == NOTHING


def test_a_failed_stage_keeps_its_checkpoint_for_a_day(place: Installation) -> None:
    """Until then, the job can be continued from it."""
    place.start()
    held = place.claim()
    stored = place.put(held, "checkpoint")
    execution.checkpoint(place.service.uow, place.service.settings, held, stored)
    failure = StageFailure("non_finite", "nan", retryable=False)
    execution.fail(place.service.uow, place.service.settings, held, failure)
    assert place.collect() == NOTHING
    place.age(stored.key)
    assert place.collect().checkpoints == 1
    assert place.keys() == set()


def test_more_than_a_page_of_each(place: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STAGES", "_KEYS", "_CHECKPOINTS", "_ARTIFACTS", "_SAMPLES"):
        monkeypatch.setattr(collector, name, 1)
    job_id, _, _, _ = two_shards(place)
    held = place.claim()
    orphans = [place.put(held, f"orphan-{n}") for n in range(5)]
    place.finish(held)
    cancel_job(place.service, job_id)
    place.age(*(stored.key for stored in orphans))
    assert place.collect(keep_trajectories="none") == Collected(
        objects=5, checkpoints=0, trajectories=2, scratch_folders=0
    )
    assert place.keys() == place.named()


def test_each_stage_is_listed_once_after_its_end_and_the_bucket_never(place: Installation) -> None:
    """A running stage is not listed, nor one that never ran."""
    store = WrappedStore(place.service.store)
    place.start()
    ended, running = place.claim(), place.claim()
    place.finish(ended)
    cancel_job(place.service, ended.job_id)
    place.age()
    collector = place.with_store(store).collector()
    collector.run()
    assert store.listed == [f"jobs/{ended.job_id}/{ended.stage_id}"]
    assert running.stage_id != ended.stage_id
    collector.run()
    assert len(store.listed) == 1


def two_leftovers(place: Installation) -> list[StoredObject]:
    """Objects without rows of two stages that ended two days ago."""
    place.start()
    held = [place.claim(), place.claim()]
    orphans = [place.put(claimed, "orphan") for claimed in held]
    for claimed in held:
        place.finish(claimed)
    place.age(*(stored.key for stored in orphans))
    return orphans


def test_a_collection_continues_where_the_last_run_stopped(
    place: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "_STAGES", 1)
    two_leftovers(place)
    runs = place.collector()
    results = [runs.run(seconds=0) for _ in range(11)]  # a batch each: eight empty tasks, two stages, the end
    assert sum(collected.objects for collected in results) == 2
    assert [collected.complete for collected in results] == [False] * 10 + [True]
    stop = threading.Event()
    stop.set()
    assert not runs.run(stop=stop).complete


def test_a_stage_that_cannot_be_listed_does_not_block_the_others(place: Installation) -> None:
    store = WrappedStore(place.service.store)
    orphans = two_leftovers(place)

    store.unlistable = orphans[0].key.rsplit("/", 2)[0]  # the folder of its stage
    runs = place.with_store(store).collector()
    with pytest.raises(StorageError, match="cannot list"):
        runs.run()
    assert runs.run().objects == 1
    assert place.keys() == {orphans[0].key}

    store.unlistable = ""
    assert runs.run().objects == 1


def test_objects_whose_rows_were_deleted_before_a_failure_are_removed_later(place: Installation) -> None:
    """Also if their stages were collected before."""
    store = WrappedStore(place.service.store)
    job_id, _, _, files = two_shards(place)
    cancel_job(place.service, job_id)
    place.age(*files)
    assert place.collect() == NOTHING

    store.removes = False
    runs = place.with_store(store).collector(keep_trajectories="none")
    with pytest.raises(StorageError, match="cannot remove"):
        runs.run()
    assert place.keys() >= set(files)
    assert place.keys() != place.named()

    store.removes = True
    while not runs.run().complete:
        pass
    assert place.collect(keep_trajectories="none").complete
    assert place.keys() == place.named()


def test_all_leftovers_are_also_those_of_stages_that_were_collected_before(place: Installation) -> None:
    place.start()
    held = place.claim()
    place.finish(held)
    place.age()
    assert place.collect() == NOTHING
    late = place.put(held, "late")
    place.age(late.key)
    assert place.collect() == NOTHING
    service = place.service
    assert remove_all_leftovers(service.uow, service.store, service.settings) == 1
    assert place.keys() == set()


def test_sweeps_are_on_time_while_a_collection_hangs(place: Installation) -> None:
    place.start()
    held = place.claim()
    place.finish(held)
    place.age()
    hanging = threading.Event()
    release = threading.Event()
    stop = threading.Event()
    swept = threading.Semaphore(0)

    class HangingStore(WrappedStore):
        def objects(self, folder: str = "jobs") -> Iterator[ListedObject]:
            hanging.set()
            release.wait(60)
            return super().objects(folder)

    service = replace(place.service, store=HangingStore(place.service.store))
    thread = threading.Thread(target=maintain, args=(service, stop, swept.release))
    thread.start()
    try:
        assert hanging.wait(60)
        for _ in range(3):
            assert swept.acquire(timeout=60)
    finally:
        stop.set()
        release.set()
        thread.join()
    assert not [running.name for running in threading.enumerate() if running.name == "collection"]


def test_one_process_collects_at_a_time(place: Installation) -> None:
    runs = place.collector()
    service = place.service
    stop = threading.Event()
    with maintenance._lock(service, AdvisoryLock.COLLECTION) as is_locked:
        assert is_locked
        stop.set()  # a run would be incomplete
        assert maintenance._collect_once(service, runs, stop) is True
        assert maintenance.sweep_once(service) is True  # sweeps have a lock of their own
    assert maintenance._collect_once(service, runs, stop) is False


def test_workers_that_write_meanwhile_lose_nothing(place: Installation) -> None:
    for seed in range(2):
        create_job(place.service, RoundSpec.model_validate(round_body(evaluation=None, seed=seed)))
    over = threading.Event()

    def collect_all_the_time() -> None:
        while not over.is_set():
            place.collect(collect_after_seconds=1e-9)  # no grace period: only rows protect objects

    thread = threading.Thread(target=collect_all_the_time)
    thread.start()
    try:
        for _ in range(4):
            sampled(place, place.claim())
    finally:
        over.set()
        thread.join()
    assert len(place.named()) == 4 * 3
    assert place.keys() == place.named()


def test_the_maintenance_collects(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data", tmp_path / "tiny")
    service = Service.open(settings)
    place = Installation(service, tmp_path / "data" / "artifacts", None)
    job_id = place.start()
    held = place.claim()
    orphan = place.put(held, "orphan")
    cancel_job(service, job_id)
    execution.cancelled(service.uow, settings, held)
    place.age(orphan.key)
    stop = threading.Event()
    thread = threading.Thread(target=maintain, args=(service, stop))
    thread.start()
    try:
        for _ in range(600):
            if not place.keys():
                break
            threading.Event().wait(0.1)
    finally:
        stop.set()
        thread.join()
    assert place.keys() == set()
    service.close()
