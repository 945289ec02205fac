import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from service.db.tables import Artifact
from service.errors import StageStoppedError, StorageError
from service.storage import StoredObject
from service.storage.files import FileStore
from worker import context as context_module
from worker.context import StageContext
from worker.workbench import Workbench


class Heartbeat:
    """Notes what the stage waits for. The stage must stop after `phases_until_stop` phases."""

    def __init__(self, phases_until_stop: int | None = None) -> None:
        self.phases: list[str] = []
        self.plans: list[int] = []
        self.done = 0
        self._phases_until_stop = phases_until_stop

    def check(self) -> None:
        if len(self.phases) == self._phases_until_stop:
            raise StageStoppedError("this worker is stopping")

    def plan(self, total: int) -> None:
        self.plans.append(total)

    @contextmanager
    def phase(self, activity: str) -> Iterator[None]:
        self.phases.append(activity)
        yield


def context_of(store: FileStore, scratch: Path, heartbeat: Heartbeat | None = None) -> StageContext:
    claim = SimpleNamespace(job_id="job_1", stage_id="stg_1", kind="sample")
    bench = Workbench(cast("Any", SimpleNamespace(batch_size=8)), *[cast("Any", None)] * 6)
    bench.store = store
    return StageContext(cast("Any", bench), cast("Any", claim), cast("Any", heartbeat or Heartbeat()), scratch)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), np.uint8)


def test_images_are_stored_by_threads_and_read_in_their_order(tmp_path: Path) -> None:
    """The first image is stored last: its thread waits for the second one."""
    second_is_stored = threading.Event()

    class Store(FileStore):
        def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
            if slot == "image-000000":
                assert second_is_stored.wait(30)
            stored = super().put(job_id, stage_id, slot, source)
            if slot == "image-000001":
                second_is_stored.set()
            return stored

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    context = context_of(Store(tmp_path / "store"), scratch)
    images = random_images(5)
    with context.storing_images() as writer:
        writer.add_batch(images[:2])
        writer.add_batch(images[2:])
        ids = writer.ids()

    assert ids == [artifact.id for artifact in context.artifacts]
    assert [artifact.slot for artifact in context.artifacts] == [f"image-00000{row}" for row in range(5)]
    assert np.array_equal(np.stack(context.load_images(context.artifacts)), images)
    assert list(scratch.iterdir()) == []
    assert cast("Any", context.heartbeat).phases[:2] == ["storing image-000000", "storing image-000001"]


def test_an_image_that_cannot_be_stored_fails_the_stage(tmp_path: Path) -> None:
    class Store(FileStore):
        def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
            if slot == "image-000001":
                raise StorageError("away")
            return super().put(job_id, stage_id, slot, source)

    context = context_of(Store(tmp_path / "store"), tmp_path)
    with pytest.raises(StorageError, match="away"), context.storing_images() as writer:
        writer.add_batch(random_images(3))
        writer.ids()
    assert "image-000001" not in [artifact.slot for artifact in context.artifacts]


def test_an_image_that_cannot_be_stored_ends_sampling_at_the_next_batch(tmp_path: Path) -> None:
    class Store(FileStore):
        def put(self, *_: object) -> StoredObject:
            raise StorageError("away")

    context = context_of(Store(tmp_path / "store"), tmp_path)
    with pytest.raises(StorageError, match="away"), context.storing_images() as writer:
        writer.add("first", random_images(1)[0])
        wait([result for _, result in writer._pending])
        writer.add("second", random_images(1)[0])
        pytest.fail("the second image was accepted")


def stored_images(tmp_path: Path, count: int) -> list[Artifact]:
    context = context_of(FileStore(tmp_path / "store"), tmp_path)
    with context.storing_images() as writer:
        writer.add_batch(random_images(count))
        writer.ids()
    return context.artifacts


def test_after_a_failed_read_no_further_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first read fails; the others of the four threads end when the pool is shut down."""
    artifacts = stored_images(tmp_path, 12)
    ended = threading.Event()
    reads: list[str] = []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait)

    class Store(FileStore):
        @contextmanager
        def borrow(self, key: str, sha256: str) -> Iterator[Path]:
            reads.append(key)
            if key == artifacts[0].key:
                raise StorageError("away")
            assert ended.wait(30)
            with super().borrow(key, sha256) as path:
                yield path

    monkeypatch.setattr(context_module, "ThreadPoolExecutor", Pool)
    with pytest.raises(StorageError, match="away"):
        context_of(Store(tmp_path / "store"), tmp_path).load_images(artifacts)
    assert len(reads) <= 5  # the thread of the first one may have begun another


def test_a_stop_is_noticed_between_two_images(tmp_path: Path) -> None:
    artifacts = stored_images(tmp_path, 3)
    reader = context_of(FileStore(tmp_path / "store"), tmp_path, Heartbeat(phases_until_stop=2))
    with pytest.raises(StageStoppedError):
        reader.load_images(artifacts)

    writer = context_of(FileStore(tmp_path / "store"), tmp_path, Heartbeat(phases_until_stop=2))
    with pytest.raises(StageStoppedError), writer.storing_images() as images:
        images.add_batch(random_images(3))
        images.ids()
    assert len(writer.artifacts) == 2


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of ten values fit, each batch takes 5 steps, and one that fails takes 1. So the stage plans 2 batches of
    8, 3 of 4, then 5 of 2, and the steps that failed."""
    heartbeat = Heartbeat()
    context = context_of(FileStore(tmp_path / "files"), tmp_path, heartbeat)
    notes: list[str] = []
    monkeypatch.setattr(StageContext, "note", lambda _self, _kind, message: notes.append(message))

    def work(batch: range) -> list[int]:
        if len(batch) > 3:
            heartbeat.done += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        heartbeat.done += 5
        return list(batch)

    results = list(context.in_batches(range(10), cast("Any", work), steps=5))
    assert results == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert heartbeat.plans == [2 * 5, 1 + 3 * 5, *[2 + 5 * 5] * 5]
    assert notes == [
        "out of GPU memory with a batch of 8: continuing with batches of 4",
        "out of GPU memory with a batch of 4: continuing with batches of 2",
    ]

    # the next stage of this kind starts with the smaller size, stages of other kinds and jobs with the setting
    assert [len(batch) for batch in context.in_batches(range(4), cast("Any", work))] == [2, 2]
    assert len(notes) == 2
    for changes in ({"kind": "fuse"}, {"job_id": "job_2"}):
        other = SimpleNamespace(**vars(context.claim) | changes)
        assert context.bench.batch_size(cast("Any", other)) == 8


def test_a_single_value_that_does_not_fit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(FileStore(tmp_path / "files"), tmp_path)
    monkeypatch.setattr(StageContext, "note", lambda *_: None)

    def work(_batch: range) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(context.in_batches(range(4), work))
