import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from service.errors import StorageError
from service.storage import StoredObject
from service.storage.files import FileStore
from worker.context import StageContext


class Heartbeat:
    """Notes what the stage waits for."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    @contextmanager
    def phase(self, activity: str) -> Iterator[None]:
        self.phases.append(activity)
        yield


def context_of(store: FileStore, scratch: Path) -> StageContext:
    claim = SimpleNamespace(job_id="job_1", stage_id="stg_1")
    return StageContext(
        cast("Any", SimpleNamespace(store=store)), cast("Any", claim), cast("Any", Heartbeat()), scratch
    )


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
    assert [artifact.slot for artifact in context.artifacts] == ["image-000000"]
