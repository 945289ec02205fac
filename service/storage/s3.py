"""Objects in a bucket of an S3 server, through minio-py (docs/decisions/012-storage.md)."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from xml.etree.ElementTree import ParseError

from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.response import BaseHTTPResponse

from service.errors import StartError, StorageCorruptError, StorageError, StorageGoneError
from service.settings import Settings
from service.storage.base import CHUNK_BYTES, ROOT, ListedObject, StoredObject, file_sha256, object_key
from service.storage.cache import FileCache
from service.storage.scratch import remove_dead, scratch_folder

_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_RETRIES = 2
_PROBE_SECONDS = 1
_PART_BYTES = 16 << 20
_FAILURES = (MinioException, HTTPError, OSError, ParseError)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_logger = logging.getLogger(__name__)


class S3Store:
    """Objects in one bucket, with local copies of those read last. For one process: forked ones open their own."""

    def __init__(
        self,
        client: Minio,
        prober: Minio,
        bucket: str,
        folder: Path,
        cache_bytes: int,
        signer: Minio | None,
        presign_seconds: int,
    ) -> None:
        self._client, self._prober, self._bucket = client, prober, bucket
        self._scratch = folder / "scratch"
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._cache = FileCache(folder / "cache", cache_bytes)
        self._signer, self._presign_seconds = signer, presign_seconds

    @classmethod
    def open(cls, settings: Settings) -> S3Store:
        """The settings' bucket, made if it is missing. Raises StartError where the server refuses it.

        A server that does not answer just now is none: stages are tried again until it does.
        """
        client = _client(settings, settings.s3_endpoint)
        prober = _client(settings, settings.s3_endpoint, probes=True)
        signer = _client(settings, settings.s3_public_endpoint) if settings.s3_public_endpoint else None
        bucket, folder = settings.s3_bucket, settings.data_dir
        store = cls(
            client, prober, bucket, folder.absolute(), settings.s3_cache_bytes, signer, settings.presign_seconds
        )
        try:
            if not client.bucket_exists(bucket):
                store._make_bucket()
        except (MinioException, ValueError) as error:
            raise StartError(f"the S3 server refuses the bucket {bucket!r}: {_reason(error)}") from error
        except _FAILURES as error:
            _logger.warning("the S3 server at %s does not answer: %s", settings.s3_endpoint, _reason(error))
        return store

    def scratch(self) -> AbstractContextManager[Path]:
        """A local folder for unfinished files; removed at the end."""
        return scratch_folder(self._scratch)

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of the file `source`, and read it back. Raises StorageError."""
        sha256 = file_sha256(source)
        key = object_key(job_id, stage_id, slot, sha256)
        with _told(f"store {key}"):
            size = self._upload(key, source)
            found = _sha256(self._pieces(key, 0, None))
        if found != sha256:
            raise StorageError(f"cannot store {key}: what was read back has other bytes")
        return StoredObject(key, sha256, size)

    def _upload(self, key: str, source: Path) -> int:
        try:
            return self._upload_once(key, source)
        except MinioException as error:
            if _code(error) != "NoSuchBucket":
                raise
        self._make_bucket()
        return self._upload_once(key, source)

    def _upload_once(self, key: str, source: Path) -> int:
        size = source.stat().st_size
        with source.open("rb") as file:
            # one part after the other: minio's threads for parallel parts outlive a failed read of the file
            self._client.put_object(self._bucket, key, file, size, part_size=_PART_BYTES, num_parallel_uploads=1)
        return size

    def _make_bucket(self) -> None:
        try:
            self._client.make_bucket(self._bucket)
        except MinioException as error:  # another process was faster
            if _code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    @contextmanager
    def borrow(self, key: str, sha256: str) -> Iterator[Path]:
        """A local copy of the object, checked. Raises StorageError, StorageCorruptError for other bytes."""
        with ExitStack() as stack:
            with _told(f"read {key}"):
                path = self._fetch(_checked(key), sha256, stack.enter_context(self.scratch()))
            yield path

    def _fetch(self, key: str, sha256: str, folder: Path) -> Path:
        copy, fresh = folder / "copy", folder / "fresh"  # two names: `copy` may be one file with the cache's
        if self._cache.lend(sha256, copy):
            return copy
        with fresh.open("wb") as file:
            found = _sha256(self._pieces(key, 0, None), file)
        if found != sha256:
            raise StorageCorruptError(f"{key}: expected SHA-256 {sha256}, got {found}")
        self._cache.keep(sha256, fresh)
        return fresh

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to, not including, `stop`. Raises StorageError, as a rule before the first."""
        with _told(f"read {key}"):
            if stop > start:
                return self._pieces(_checked(key), start, stop)
            self._client.stat_object(self._bucket, _checked(key))  # the protocol has no empty ranges
            return iter(())

    def _pieces(self, key: str, start: int, stop: int | None) -> Iterator[bytes]:
        """Asks at once, so that what fails fails here; the bytes come as they are read."""
        length = 0 if stop is None else stop - start
        return _stream(key, self._client.get_object(self._bucket, key, start, length))

    def remove(self, key: str) -> None:
        """Forget an object that no row names any more; nothing happens where it is not there."""
        with _told(f"remove {key}"):
            self._client.remove_object(self._bucket, _checked(key))

    def objects(self) -> Iterator[ListedObject]:
        """All objects of this service, page by page. Raises StorageError."""
        with _told("list the bucket"):
            for found in self._client.list_objects(self._bucket, prefix=f"{ROOT}/", recursive=True):
                if found.object_name and found.last_modified:
                    yield ListedObject(found.object_name, time.time() - found.last_modified.timestamp())

    def probe(self) -> None:
        """Whether the server answers and knows the bucket. Raises StorageError."""
        with _told("reach the bucket"):
            is_there = self._prober.bucket_exists(self._bucket)
        if not is_there:
            raise StorageError("the bucket is not there")

    def remove_dead_scratch(self, older_than_seconds: float) -> int:
        """Remove scratch folders that old whose processes are gone; how many there were."""
        return remove_dead(self._scratch, older_than_seconds)

    def public_url(self, key: str, media_type: str) -> str | None:
        """A presigned GET for the public endpoint's host; None if there is none. Asks no server."""
        if self._signer is None:
            return None
        headers: dict[str, str | list[str] | tuple[str]] = {"response-content-type": media_type}
        expires = timedelta(seconds=self._presign_seconds)
        return self._signer.presigned_get_object(self._bucket, _checked(key), expires, response_headers=headers)


def _client(settings: Settings, endpoint: str, probes: bool = False) -> Minio:
    """A client with an explicit region, so that it never asks for one; one that `probes` waits for a second at most.

    Raises StartError for a wrong endpoint.
    """
    scheme, _, host = endpoint.rpartition("://")
    # minio's defaults wait five minutes for a connection, five times over
    retries = Retry(
        total=0 if probes else _RETRIES,
        backoff_factor=0.2,
        status_forcelist=(500, 502, 503, 504),
        respect_retry_after_header=False,
    )
    connect, read = (_PROBE_SECONDS, _PROBE_SECONDS) if probes else (_CONNECT_SECONDS, _READ_SECONDS)
    pool = PoolManager(timeout=Timeout(connect=connect, read=read), retries=retries)
    try:
        return Minio(
            host.rstrip("/"),
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            secure=settings.s3_secure if not scheme else scheme == "https",
            region=settings.s3_region,
            http_client=pool,
        )
    except ValueError as error:
        raise StartError(f"the S3 endpoint {endpoint!r} cannot be used: {error}") from error


def _checked(key: str) -> str:
    """`key`, if it is one below the bucket's root. Raises StorageError."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"the key {key!r} leads out of the store")
    return key


def _sha256(pieces: Iterable[bytes], to: BinaryIO | None = None) -> str:
    """SHA-256 of the pieces, in hexadecimal; they are written to `to` on the way."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
        if to is not None:
            to.write(piece)
    return total.hexdigest()


def _stream(key: str, response: BaseHTTPResponse) -> Iterator[bytes]:
    """The body; urllib3 notices where it ends early. Raises StorageError."""
    try:
        with _told(f"read {key}"):
            yield from response.stream(CHUNK_BYTES)
    finally:
        response.close()
        response.release_conn()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever goes wrong with the server or the disk is a StorageError."""
    try:
        yield
    except _FAILURES as error:
        kind = StorageGoneError if _code(error) in ("NoSuchKey", "NoSuchObject") else StorageError
        raise kind(f"cannot {what}: {_reason(error)}") from error


def _code(error: Exception) -> str:
    """The server's name of the error, also where it is text/xml, which minio does not read; "" if it gives none."""
    if isinstance(error, S3Error):
        return error.code or ""
    found = _CODE.search(str(error)) if isinstance(error, InvalidResponseError) else None
    return found[1] if found else ""


def _reason(error: Exception) -> str:
    """Short, and without addresses: clients see it. The cause has the rest."""
    cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
    return _code(error) or type(cause).__name__
