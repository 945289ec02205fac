"""What only files can get wrong; what every store does is in tests/integration/test_storage.py."""

from pathlib import Path

import pytest

from service.errors import StorageError
from service.storage import FileStore


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="leads out"):
        store.read("link", 0, 1)


def test_an_unfinished_copy_is_listed_and_can_be_removed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    left = tmp_path / "jobs" / "job_1" / "stg_1" / "image" / ".part-abc"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"hel")
    assert [found.key for found in store.objects()] == ["jobs/job_1/stg_1/image/.part-abc"]
    store.remove("jobs/job_1/stg_1/image/.part-abc")
    assert list(store.objects()) == []
