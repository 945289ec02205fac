"""Garbage collection of objects, on files and on a real S3 server."""

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.queries import jobs, stages
from service.db.tables import Artifact, Pair, Sample, Stage
from service.jobs import collector, execution
from service.jobs.collector import Collected, collect
from service.jobs.execution import Claim
from service.jobs.kinds import RoundSpec
from service.service import Service, cancel_job, create_job
from service.storage import StoredObject
from tests.servers import S3Server
from tests.service import round_body, settings_for
from tests.stored_pairs import Results
from worker.local import work

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
        with self.service.store.scratch() as scratch:
            source = scratch / "source"
            source.write_bytes(f"{held.stage_id} {slot}".encode())
            return self.service.store.put(held.job_id, held.stage_id, slot, source)

    def finish(self, held: Claim, record: Callable[[Session], None] = lambda _session: None) -> None:
        execution.finish(self.service.uow, self.service.settings, held, record)

    def age(self, *keys: str) -> None:
        """Set the age of these objects to two days."""
        for key in keys:
            status = (self.folder / key).stat()
            os.utime(self.folder / key, (status.st_mtime - 2 * DAY, status.st_mtime - 2 * DAY))
        if self.server is not None:
            self.server.clear_cache()

    def keys(self) -> set[str]:
        return {stored.key for stored in self.service.store.objects()}

    def named(self) -> set[str]:
        """Return the object keys that rows refer to."""
        with self.service.uow.reading() as session:
            named = {*session.scalars(select(Artifact.key)), *session.scalars(select(Stage.checkpoint_key))}
        return {key for key in named if key is not None}


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

    def record(session: Session) -> None:
        session.add_all(files.values())
        session.flush()
        session.add_all(rows)

    place.finish(held, record)
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


def test_trajectories_stay_while_a_job_may_work_on_them(place: Installation) -> None:
    job_id, _, _, _ = two_shards(place)
    cancel_job(place.service, job_id)
    waiting = place.start()
    with place.service.uow.writing() as session:
        jobs.get(session, waiting).kind = "training"
    assert place.collect(keep_trajectories="none").trajectories == 0
    cancel_job(place.service, waiting)
    assert place.collect(keep_trajectories="none").trajectories == 2


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
    place.age(named.key, old.key, unfinished.key, stranger.key)
    assert place.collect() == Collected(objects=1, checkpoints=0, trajectories=0, scratch_folders=0)
    assert place.keys() == {named.key, young.key, unfinished.key, stranger.key}
    place.finish(running)
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
        execution.checkpoint(place.service.uow, held, stored)
    place.age(replaced.key, last.key)
    assert place.collect() == NOTHING
    place.finish(held)
    assert place.collect() == Collected(objects=1, checkpoints=1, trajectories=0, scratch_folders=0)
    assert place.keys() == set()
    with place.service.uow.reading() as session:
        row = stages.get(session, held.stage_id)
    assert (row.checkpoint_key, row.checkpoint_sha256) == (None, None)
    assert place.collect() == NOTHING


def test_more_than_a_page_of_each(place: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_PAGE", 2)
    monkeypatch.setattr(collector, "_ROWS", 1)
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


def test_a_worker_collects(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data", tmp_path / "tiny")
    service = Service.open(settings)
    place = Installation(service, tmp_path / "data" / "artifacts", None)
    job_id = place.start()
    orphan = place.put(place.claim(), "orphan")
    cancel_job(service, job_id)
    with service.uow.writing() as session:
        for stage in stages.of_job(session, job_id):
            stage.state = "cancelled"
    place.age(orphan.key)
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(settings, "w", stop))
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
