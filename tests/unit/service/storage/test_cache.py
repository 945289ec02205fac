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


def test_those_used_last_are_kept(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 300)
    first, second, third = (keep(cache, tmp_path, bytes([n]) * 100, used_at=n) for n in (1, 2, 3))
    assert is_kept(cache, tmp_path, first)  # and thereby used now
    keep(cache, tmp_path, b"4" * 100, used_at=4)
    assert [is_kept(cache, tmp_path, sha256) for sha256 in (first, second, third)] == [True, False, True]
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) == 300


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    for most_bytes in (0, 99):
        cache = FileCache(tmp_path / "cache", most_bytes)
        assert not is_kept(cache, tmp_path, keep(cache, tmp_path, b"x" * 100))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_lent_copy_stays_when_it_is_dropped(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 100)
    sha256 = keep(cache, tmp_path, b"a" * 100, used_at=1)
    assert cache.lend(sha256, tmp_path / "link")
    os.utime(tmp_path / "link", (1, 1))
    keep(FileCache(tmp_path / "cache", 100), tmp_path, b"b" * 100)  # as another process would
    assert not (tmp_path / "cache" / sha256).exists()
    assert (tmp_path / "link").read_bytes() == b"a" * 100


def test_a_damaged_copy_is_dropped(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 100)
    sha256 = keep(cache, tmp_path, b"hello")
    (tmp_path / "cache" / sha256).write_bytes(b"jello")
    assert not is_kept(cache, tmp_path, sha256)
    keep(cache, tmp_path, b"hello")
    assert is_kept(cache, tmp_path, sha256)


def test_a_disk_without_hard_links_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    cache = FileCache(tmp_path / "cache", 100)
    assert not is_kept(cache, tmp_path, keep(cache, tmp_path, b"hello"))
