"""Behaviour of the file store alone. tests/integration/test_storage.py tests what all stores have in common."""

from pathlib import Path

import pytest

from service.errors import StorageError
from service.storage import FileStore


def test_symbolic_links_out_of_the_store_are_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="is outside the store"):
        store.read("link", 0, 1)


def test_a_leftover_of_an_unfinished_write_is_listed_and_can_be_removed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    leftover = tmp_path / "jobs" / "job_1" / "stg_1" / "image" / ".part-abc"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"hel")

    assert [stored.key for stored in store.objects()] == ["jobs/job_1/stg_1/image/.part-abc"]

    store.remove("jobs/job_1/stg_1/image/.part-abc")
    assert list(store.objects()) == []
