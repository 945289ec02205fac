from pathlib import Path

import pytest

from api.core.errors import StorageCorruptError, StorageError
from api.core.storage import FileStore, object_key

SHA_OF_HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(b"hello")
    return file


def test_an_object_is_found_under_its_key(tmp_path: Path, source: Path) -> None:
    store = FileStore(tmp_path / "store")
    stored = store.put("job_1", "stg_1", "image", source)
    assert (stored.key, stored.size_bytes) == (f"jobs/job_1/stg_1/image/{SHA_OF_HELLO}", 5)
    with store.borrow(stored.key, stored.sha256) as path:
        assert path.read_bytes() == b"hello"
    assert b"".join(store.read(stored.key, 1, 4)) == b"ell"
    assert store.put("job_1", "stg_1", "image", source) == stored
    assert [p.name for p in (tmp_path / "store").rglob("*") if p.is_file()] == [SHA_OF_HELLO]


def test_changed_bytes_are_noticed(tmp_path: Path, source: Path) -> None:
    store = FileStore(tmp_path / "store")
    stored = store.put("job_1", "stg_1", "image", source)
    (tmp_path / "store" / stored.key).write_bytes(b"jello")
    with pytest.raises(StorageCorruptError, match="expected SHA-256"), store.borrow(stored.key, stored.sha256):
        pass


def test_a_removed_object_is_gone(tmp_path: Path, source: Path) -> None:
    store = FileStore(tmp_path / "store")
    stored = store.put("job_1", "stg_1", "image", source)
    store.remove(stored.key)
    store.remove(stored.key)
    with pytest.raises(StorageError, match="cannot read"):
        store.read(stored.key, 0, 1)


@pytest.mark.parametrize("part", ["", "..", "a..b", "/", "a/b", "A", ".hidden", "a\0", "x" * 101])
def test_keys_are_made_of_plain_names(part: str) -> None:
    with pytest.raises(StorageError, match="not a name"):
        object_key("job_1", part, "image", SHA_OF_HELLO)


@pytest.mark.parametrize("key", ["../outside", "jobs/../../outside", "/etc/passwd", "", "."])
def test_keys_do_not_lead_out(tmp_path: Path, key: str) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(StorageError, match="leads out"):
        FileStore(tmp_path / "store").read(key, 0, 1)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="leads out"):
        store.read("link", 0, 1)
