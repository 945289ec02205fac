import hashlib
import os
from pathlib import Path

import pytest

from service.storage.cache import FileCache


def keep(cache: FileCache, folder: Path, data: bytes, used_at: float | None = None) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    file = folder / f"source-{sha256}"
    file.write_bytes(data)
    if used_at is not None:
        os.utime(file, (used_at, used_at))
    cache.keep(sha256, file)
    file.unlink()
    return sha256


def is_kept(cache: FileCache, folder: Path, sha256: str) -> bool:
    link = folder / f"link-{sha256}"
    lent = cache.lend(sha256, link)
    link.unlink(missing_ok=True)
    return lent


def test_the_least_recently_used_file_is_evicted(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 300)
    first, second, third = (keep(cache, tmp_path, bytes([n]) * 100, used_at=n) for n in (1, 2, 3))
    assert is_kept(cache, tmp_path, first)  # this makes it the most recently used one

    keep(cache, tmp_path, b"4" * 100, used_at=4)

    assert [is_kept(cache, tmp_path, sha256) for sha256 in (first, second, third)] == [True, False, True]
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) == 300


def test_a_file_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    for max_bytes in (0, 99):
        cache = FileCache(tmp_path / "cache", max_bytes)
        assert not is_kept(cache, tmp_path, keep(cache, tmp_path, b"x" * 100))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_link_stays_valid_after_its_file_is_evicted(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 100)
    sha256 = keep(cache, tmp_path, b"a" * 100, used_at=1)
    assert cache.lend(sha256, tmp_path / "link")
    os.utime(tmp_path / "link", (1, 1))

    keep(FileCache(tmp_path / "cache", 100), tmp_path, b"b" * 100)  # like another process

    assert not (tmp_path / "cache" / sha256).exists()
    assert (tmp_path / "link").read_bytes() == b"a" * 100


def test_a_corrupt_file_is_removed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 100)
    sha256 = keep(cache, tmp_path, b"hello")
    (tmp_path / "cache" / sha256).write_bytes(b"jello")
    assert not is_kept(cache, tmp_path, sha256)

    keep(cache, tmp_path, b"hello")
    assert is_kept(cache, tmp_path, sha256)


def test_a_file_system_without_hard_links_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    cache = FileCache(tmp_path / "cache", 100)
    assert not is_kept(cache, tmp_path, keep(cache, tmp_path, b"hello"))
