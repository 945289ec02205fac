"""Behaviour of all stores, on files and on a real S3 server; then errors specific to S3."""

import hashlib
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import StartError, StorageCorruptError, StorageError
from service.storage import Store, StoredObject, open_store, stage_folder
from service.storage import s3 as s3_module
from tests.proxy import proxy
from tests.servers import S3Server, s3_server
from tests.service import settings_for

HELLO = b"hello"
SHA_OF_HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
KEY_OF_HELLO = f"jobs/job_1/stg_1/image/{SHA_OF_HELLO}"


@dataclass
class Place:
    """A store, and the folder of its objects."""

    store: Store
    folder: Path
    server: S3Server | None = None

    def changed(self) -> None:
        """Make direct changes of files visible to the store."""
        if self.server is not None:
            self.server.clear_cache()

    def put(self, data: bytes = HELLO, slot: str = "image") -> StoredObject:
        with self.store.scratch() as scratch:
            source = scratch / "source"
            source.write_bytes(data)
            return self.store.put("job_1", "stg_1", slot, source)

    def fetch(self, stored: StoredObject) -> bytes:
        with self.store.borrow(stored.key, stored.sha256) as path:
            return path.read_bytes()

    def keys(self) -> list[str]:
        return sorted(stored.key for stored in self.store.objects())


def on_s3(server: S3Server, data_dir: Path, **changes: Any) -> Place:
    bucket = f"bucket-{secrets.token_hex(4)}"
    settings = settings_for(data_dir, data_dir, **(server.settings(bucket) | changes))
    return Place(open_store(settings), server.folder / settings.s3_bucket, server)


@pytest.fixture(params=["files", "s3", "s3 without copies"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "files":
        return Place(open_store(settings_for(tmp_path / "data", tmp_path)), tmp_path / "data" / "artifacts")
    changes = {"s3_cache_bytes": 0} if request.param == "s3 without copies" else {}
    return on_s3(request.getfixturevalue("s3"), tmp_path / "data", **changes)


def test_an_object_is_found_under_its_key(place: Place) -> None:
    stored = place.put()
    assert stored == StoredObject(KEY_OF_HELLO, SHA_OF_HELLO, 5)
    assert place.fetch(stored) == HELLO
    assert (place.folder / stored.key).read_bytes() == HELLO


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 4), (4, 5), (0, 1), (0, 0), (5, 5)])
def test_a_part_of_an_object_is_read(place: Place, start: int, stop: int) -> None:
    assert b"".join(place.store.read(place.put().key, start, stop)) == HELLO[start:stop]


def test_the_same_bytes_twice_are_one_object(place: Place) -> None:
    assert place.put() == place.put()
    assert place.keys() == [KEY_OF_HELLO]


def test_an_empty_object_and_one_of_several_parts(place: Place) -> None:
    data = hashlib.sha256(b"seed").digest() * (17 << 15)  # 17 MiB: uploads are in parts of 16
    for content in (b"", data):
        stored = place.put(content)
        assert (stored.size_bytes, place.fetch(stored) == content) == (len(content), True)
    border = 16 << 20
    assert b"".join(place.store.read(stored.key, border - 3, border + 3)) == data[border - 3 : border + 3]
    assert sum(len(piece) for piece in place.store.read(stored.key, 0, len(data))) == len(data)


def test_what_is_not_there_is_worth_another_try(place: Place) -> None:
    place.put()
    missing = KEY_OF_HELLO.replace("image", "other")
    for attempt in (
        lambda: place.store.read(missing, 0, 5),
        lambda: place.store.read(missing, 0, 0),
        lambda: place.fetch(StoredObject(missing, SHA_OF_HELLO, 5)),
    ):
        with pytest.raises(StorageError, match="cannot read") as caught:
            attempt()
        assert caught.value.retryable


@pytest.mark.parametrize("damage", [b"jello", b"hell", b"hello and more", b""])
def test_corrupt_bytes_are_detected_and_repaired_by_storing_them_again(place: Place, damage: bytes) -> None:
    stored = place.put()
    (place.folder / stored.key).write_bytes(damage)
    place.changed()
    with pytest.raises(StorageCorruptError, match=f"expected SHA-256 {SHA_OF_HELLO}") as caught:
        place.fetch(stored)
    assert not caught.value.retryable
    assert place.fetch(place.put()) == HELLO


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """A reader of the old file sees none of the new bytes: they are written elsewhere and renamed."""
    place = Place(open_store(settings_for(tmp_path / "data", tmp_path)), tmp_path / "data" / "artifacts")
    file = place.folder / place.put().key
    file.write_bytes(b"jello")
    with file.open("rb") as reader:
        place.put()
        assert reader.read() == b"jello"
    assert file.read_bytes() == HELLO


def test_a_removed_object_is_gone_and_others_are_not(place: Place) -> None:
    stored, other = place.put(), place.put(b"other")
    place.store.remove(stored.key)
    place.store.remove(stored.key)
    assert place.keys() == [other.key]
    with pytest.raises(StorageError, match="cannot read"):
        place.store.read(stored.key, 0, 1)


def test_objects_are_listed_with_their_age(place: Place) -> None:
    old, fresh = place.put(), place.put(b"fresh")
    hour_ago = time.time() - 3600
    os.utime(place.folder / old.key, (hour_ago, hour_ago))
    place.changed()
    ages = {stored.key: stored.age_seconds for stored in place.store.objects()}
    assert set(ages) == {old.key, fresh.key}
    assert ages[old.key] - ages[fresh.key] > 1800  # an hour, minus the duration of the test


def test_the_objects_of_a_stage_are_listed_without_those_of_others(place: Place, tmp_path: Path) -> None:
    stored = place.put()
    (tmp_path / "file").write_bytes(HELLO)
    place.store.put("job_1", "stg_10", "image", tmp_path / "file")  # stg_1 is a prefix of it
    assert [listed.key for listed in place.store.objects(stage_folder("job_1", "stg_1"))] == [stored.key]
    assert list(place.store.objects(stage_folder("job_1", "stg_2"))) == []
    with pytest.raises(StorageError, match="plain name"):
        stage_folder("job_1", "..")


def test_every_object_of_many_is_listed(place: Place) -> None:
    place.put()
    folder = (place.folder / KEY_OF_HELLO).parent
    names = [f"{number:064x}" for number in range(1100)]  # an S3 server lists 1,000 at a time
    for name in names:
        (folder / name).write_bytes(b"")
    place.changed()
    assert place.keys() == sorted([KEY_OF_HELLO, *(f"jobs/job_1/stg_1/image/{name}" for name in names)])


@pytest.mark.parametrize("key", ["../outside", "jobs/../../outside", "/etc/passwd", "", "."])
def test_keys_do_not_lead_out(place: Place, key: str) -> None:
    (place.folder.parent / "outside").write_bytes(b"secret")
    for attempt in (
        lambda: place.store.read(key, 0, 1),
        lambda: place.fetch(StoredObject(key, SHA_OF_HELLO, 5)),
        lambda: place.store.remove(key),
    ):
        with pytest.raises(StorageError, match="is outside the store"):
            attempt()
    (place.folder.parent / "outside").unlink()


def test_scratch_folders_are_empty_and_temporary(place: Place) -> None:
    with place.store.scratch() as first, place.store.scratch() as second:
        assert first != second
        assert list(first.iterdir()) == []
        (first / "file").write_bytes(HELLO)
        assert place.store.remove_dead_scratch(0) == 0  # both are in use
        assert (first / "file").read_bytes() == HELLO
    assert not first.exists() and not second.exists()


def test_files_have_no_address_of_their_own(tmp_path: Path) -> None:
    assert open_store(settings_for(tmp_path, tmp_path)).public_url(KEY_OF_HELLO, "image/png") is None


def test_a_missing_bucket_is_made_by_whoever_is_first(s3: S3Server, tmp_path: Path) -> None:
    places: list[Place] = []
    threads = [
        threading.Thread(target=lambda: places.append(on_s3(s3, tmp_path, s3_bucket="shared-bucket"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({place.put().key for place in places}) == 1
    shutil.rmtree(s3.folder / "shared-bucket")
    s3.clear_cache()
    assert len(places) == 6
    assert places[0].fetch(places[1].put()) == HELLO  # the bucket is created again


@pytest.mark.parametrize("change", [{"s3_secret_key": "a-wrong-key"}, {"s3_access_key": "nobody"}])
def test_a_bucket_that_is_refused_ends_the_start(s3: S3Server, tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(StartError, match="denies access to the bucket") as caught:
        on_s3(s3, tmp_path, **change)
    assert "a-wrong-key" not in str(caught.value)


def test_a_restarted_server(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as server:
        place = on_s3(server, tmp_path / "data", s3_cache_bytes=0)
        stored = place.put()
    for attempt in (
        place.put,
        lambda: place.fetch(stored),
        lambda: place.store.read(stored.key, 0, 1),
        lambda: place.store.remove(stored.key),
        place.keys,
    ):
        with pytest.raises(StorageError, match=r"^cannot .*: NewConnectionError$") as caught:
            attempt()
        assert caught.value.retryable
    late = on_s3(server, tmp_path / "late")  # starts without the server
    with s3_server(tmp_path / "s3", server.port):
        assert place.fetch(stored) == HELLO
        assert late.fetch(late.put()) == HELLO


def test_connections_of_simultaneous_requests_are_used_again(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as a worker's threads need at once. urllib3 warns when it closes one that it cannot keep."""
    place = on_s3(s3, tmp_path)
    key = place.put().key
    with caplog.at_level(logging.DEBUG, "urllib3.connectionpool"):
        for _ in range(2):
            bodies = [place.store.read(key, 0, 5) for _ in range(5)]
            assert [b"".join(body) for body in bodies] == [HELLO] * 5

    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if "pool is full" in message]
    assert len([message for message in messages if "Starting new HTTP connection" in message]) == 4  # one was there


def test_a_silent_server_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_READ_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections, but never responds
        silent = S3Server(tmp_path, listener.getsockname()[1])
        place = on_s3(silent, tmp_path)
        with pytest.raises(StorageError, match="ReadTimeoutError"):
            place.put()


def damaged(piece: bytes) -> bytes:
    return piece.replace(HELLO, b"jello")


def cut(piece: bytes) -> bytes:
    return piece.partition(HELLO)[0]


def away(_piece: bytes) -> bytes:
    return b"HTTP/1.1 503 Slow Down\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def spoil(s3: S3Server, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Returns a function that creates a store behind a corrupting proxy, and an intact store of the same bucket."""
    with ExitStack() as stack:

        def make(**flaws: Callable[[bytes], bytes]) -> tuple[Place, Place]:
            sound = on_s3(s3, tmp_path / "sound")
            port = stack.enter_context(proxy(s3.port, **flaws))
            changes = {"s3_bucket": sound.folder.name, "s3_endpoint": f"127.0.0.1:{port}"}
            return on_s3(s3, tmp_path / "flawed", **changes), sound

        yield make


@pytest.mark.parametrize("flaw", [damaged, cut])
def test_a_corrupted_upload_is_detected_and_can_be_repeated(spoil: Callable[..., Any], flaw: Any) -> None:
    flawed, sound = spoil(requests=flaw)
    with pytest.raises(StorageError, match="cannot store") as caught:
        flawed.put()
    assert caught.value.retryable
    assert sound.fetch(sound.put()) == HELLO  # the next attempt replaces whatever the server stored


@pytest.mark.parametrize("flaw", [damaged, cut, away])
def test_an_object_is_read_back_before_its_key_is_returned(spoil: Callable[..., Any], flaw: Any) -> None:
    flawed, _ = spoil(responses=flaw)
    with pytest.raises(StorageError, match="cannot") as caught:
        flawed.put()
    assert caught.value.retryable


def test_a_download_is_checked(spoil: Callable[..., Any]) -> None:
    for flaw, error in ((damaged, StorageCorruptError), (cut, StorageError), (away, StorageError)):
        flawed, sound = spoil(responses=flaw)
        stored = sound.put()
        with pytest.raises(StorageError) as caught:
            flawed.fetch(stored)
        assert type(caught.value) is error


def test_truncated_bytes_are_an_error(spoil: Callable[..., Any]) -> None:
    flawed, sound = spoil(responses=cut)
    stored = sound.put(b"before, hello, after")
    with pytest.raises(StorageError, match="cannot read"):
        b"".join(flawed.store.read(stored.key, 0, stored.size_bytes))


def test_what_was_read_last_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as server:
        place = on_s3(server, tmp_path / "data")
        stored = place.put()
        assert place.fetch(stored) == HELLO
    assert place.fetch(stored) == HELLO
    (tmp_path / "data" / "cache" / SHA_OF_HELLO).write_bytes(b"jello")
    with pytest.raises(StorageError, match="cannot read"):  # the copy is not trusted either
        place.fetch(stored)
    with s3_server(tmp_path / "s3", server.port):
        assert place.fetch(stored) == HELLO


def test_a_presigned_url_is_good_for_its_host_and_its_time(s3: S3Server, tmp_path: Path) -> None:
    place = on_s3(s3, tmp_path, s3_public_endpoint=f"http://localhost:{s3.port}", presign_seconds=600)
    stored = place.put()
    url = place.store.public_url(stored.key, "image/png")
    assert url is not None and url.startswith(f"http://localhost:{s3.port}/")
    response = httpx.get(url, headers={"Range": "bytes=1-3"})
    assert (response.content, response.headers["content-range"]) == (b"ell", "bytes 1-3/5")
    assert response.headers["content-type"] == "image/png"
    assert httpx.get(url.replace("localhost", "127.0.0.1")).status_code == 403
    assert httpx.get(url.replace("image%2Fpng", "text%2Fhtml")).status_code == 403
    assert httpx.put(url, content=b"jello").status_code == 403
    assert httpx.get(f"http://{s3.endpoint}/{place.folder.name}/{stored.key}").status_code >= 400
    assert s3.secret_key not in url


def test_a_presigned_url_expires(s3: S3Server, tmp_path: Path) -> None:
    place = on_s3(s3, tmp_path, s3_public_endpoint=s3.endpoint, presign_seconds=1)
    url = place.store.public_url(place.put().key, "image/png")
    assert url is not None
    deadline = time.monotonic() + 60
    while httpx.get(url).status_code == 200:
        assert time.monotonic() < deadline, "it never expires"
        time.sleep(0.2)
    assert httpx.get(url).status_code in (400, 403)
