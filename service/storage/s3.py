"""A store in a bucket of an S3 server, by minio-py (docs/decisions/012-storage.md)."""

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
_CONNECTIONS = 40
"""Idle connections that are kept: as many as the API has threads. A worker uses five, four of them for images."""
_FAILURES = (MinioException, HTTPError, OSError, ParseError)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_logger = logging.getLogger(__name__)


class S3Store:
    """Objects in one bucket, with a local cache. Not fork-safe: each process opens its own store."""

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
        self._client = client
        self._prober = prober
        self._signer = signer
        self._bucket = bucket
        self._presign_seconds = presign_seconds

        self._scratch = folder / "scratch"
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._cache = FileCache(folder / "cache", cache_bytes)

    @classmethod
    def open(cls, settings: Settings) -> S3Store:
        """Open the bucket of the settings; it is created if missing.

        A server that does not respond only causes a warning, since stages are retried until it responds.

        Raises:
            StartError: The server denies access to the bucket.
        """
        client = _client(settings, settings.s3_endpoint)
        store = cls(
            client=client,
            prober=_client(settings, settings.s3_endpoint, probes=True),
            bucket=settings.s3_bucket,
            folder=settings.data_dir.absolute(),
            cache_bytes=settings.s3_cache_bytes,
            signer=_client(settings, settings.s3_public_endpoint) if settings.s3_public_endpoint else None,
            presign_seconds=settings.presign_seconds,
        )

        try:
            if not client.bucket_exists(settings.s3_bucket):
                store._make_bucket()
        except (MinioException, ValueError) as error:
            message = (
                f"the S3 server denies access to the bucket {settings.s3_bucket!r}: {_reason(error)}; "
                "check DFUSION_S3_BUCKET, DFUSION_S3_ACCESS_KEY and DFUSION_S3_SECRET_KEY"
            )
            raise StartError(message) from error
        except _FAILURES as error:
            _logger.warning("the S3 server at %s does not respond: %s", settings.s3_endpoint, _reason(error))
        return store

    def scratch(self) -> AbstractContextManager[Path]:
        """A local folder for unfinished files. It is removed at the end of the block."""
        return scratch_folder(self._scratch)

    def put(self, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        """Store a copy of a file and verify it. Raises StorageError."""
        sha256 = file_sha256(source)
        key = object_key(job_id, stage_id, slot, sha256)
        with _storage_errors(f"store {key}"):
            size = self._upload(key, source)
            actual = _sha256(self._chunks(key, 0, None))
        if actual != sha256:
            raise StorageError(f"cannot store {key}: the object has different bytes when read back")
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
            # without parallel uploads, since minio's threads would outlive a failed read of the file
            self._client.put_object(self._bucket, key, file, size, part_size=_PART_BYTES, num_parallel_uploads=1)
        return size

    def _make_bucket(self) -> None:
        try:
            self._client.make_bucket(self._bucket)
        except MinioException as error:  # another process created it meanwhile
            if _code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    @contextmanager
    def borrow(self, key: str, sha256: str) -> Iterator[Path]:
        """A verified local copy of an object. Raises StorageError, or StorageCorruptError for different bytes."""
        with ExitStack() as stack:
            with _storage_errors(f"read {key}"):
                path = self._fetch(_checked(key), sha256, stack.enter_context(self.scratch()))
            yield path

    def _fetch(self, key: str, sha256: str, folder: Path) -> Path:
        cached = folder / "cached"  # a hard link to the file in the cache, so the download must not overwrite it
        if self._cache.lend(sha256, cached):
            return cached

        download = folder / "download"
        with download.open("wb") as file:
            actual = _sha256(self._chunks(key, 0, None), file)
        if actual != sha256:
            raise StorageCorruptError(f"{key}: expected SHA-256 {sha256}, got {actual}")
        self._cache.keep(sha256, download)
        return download

    def read(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) of an object. Raises StorageError, usually before the first byte."""
        with _storage_errors(f"read {key}"):
            if stop > start:
                return self._chunks(_checked(key), start, stop)
            self._client.stat_object(self._bucket, _checked(key))  # HTTP has no empty ranges
            return iter(())

    def _chunks(self, key: str, start: int, stop: int | None) -> Iterator[bytes]:
        """Send the request now, so that its errors are raised here; the bytes are read lazily."""
        length = 0 if stop is None else stop - start
        return _stream(key, self._client.get_object(self._bucket, key, start, length))

    def remove(self, key: str) -> None:
        """Remove an object that no row references. Does nothing if it does not exist. Raises StorageError."""
        with _storage_errors(f"remove {key}"):
            self._client.remove_object(self._bucket, _checked(key))

    def objects(self, folder: str = ROOT) -> Iterator[ListedObject]:
        """The objects in a folder, page by page. Raises StorageError."""
        with _storage_errors("list the bucket"):
            for entry in self._client.list_objects(self._bucket, prefix=f"{folder}/", recursive=True):
                if entry.object_name and entry.last_modified:
                    yield ListedObject(entry.object_name, time.time() - entry.last_modified.timestamp())

    def probe(self) -> None:
        """Check that the server responds and has the bucket. Raises StorageError."""
        with _storage_errors("reach the bucket"):
            exists = self._prober.bucket_exists(self._bucket)
        if not exists:
            raise StorageError("the bucket does not exist")

    def remove_dead_scratch(self, older_than_seconds: float) -> int:
        """Remove scratch folders of this age whose processes have ended. Returns their number."""
        return remove_dead(self._scratch, older_than_seconds)

    def public_url(self, key: str, media_type: str) -> str | None:
        """A presigned URL at the public endpoint; None if it is not configured. Does not send a request."""
        if self._signer is None:
            return None

        headers: dict[str, str | list[str] | tuple[str]] = {"response-content-type": media_type}
        expires = timedelta(seconds=self._presign_seconds)
        return self._signer.presigned_get_object(self._bucket, _checked(key), expires, response_headers=headers)


def _client(settings: Settings, endpoint: str, probes: bool = False) -> Minio:
    """A client of an S3 server. The region is explicit, so that the client does not request it.

    Args:
        settings: The credentials and the region.
        endpoint: host:port or a URL.
        probes: Wait at most one second for a response, and do not retry.

    Raises:
        StartError: The endpoint is invalid.
    """
    # 1. time limits; minio's defaults wait five minutes for a connection and retry five times
    retries = Retry(
        total=0 if probes else _RETRIES,
        backoff_factor=0.2,
        status_forcelist=(500, 502, 503, 504),
        respect_retry_after_header=False,
    )
    if probes:
        timeout = Timeout(connect=_PROBE_SECONDS, read=_PROBE_SECONDS)
    else:
        timeout = Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS)
    pool = PoolManager(timeout=timeout, retries=retries, maxsize=_CONNECTIONS)

    # 2. the client
    scheme, _, host = endpoint.rpartition("://")
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
        name = "DFUSION_S3_ENDPOINT" if endpoint == settings.s3_endpoint else "DFUSION_S3_PUBLIC_ENDPOINT"
        raise StartError(f"{name}: invalid S3 endpoint {endpoint!r}: {error}") from error


def _checked(key: str) -> str:
    """Return `key` if it is below the root of the bucket. Raises StorageError."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"the key {key!r} is outside the store")
    return key


def _sha256(chunks: Iterable[bytes], copy: BinaryIO | None = None) -> str:
    """The SHA-256 of the chunks, in hexadecimal. They are also written to `copy`."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest()


def _stream(key: str, response: BaseHTTPResponse) -> Iterator[bytes]:
    """The body of a response. Raises StorageError, also for a truncated body, which urllib3 detects."""
    try:
        with _storage_errors(f"read {key}"):
            yield from response.stream(CHUNK_BYTES)
    finally:
        response.close()
        response.release_conn()


@contextmanager
def _storage_errors(action: str) -> Iterator[None]:
    """Raise failures of the server or the disk as StorageError."""
    try:
        yield
    except _FAILURES as error:
        error_type = StorageGoneError if _code(error) in ("NoSuchKey", "NoSuchObject") else StorageError
        raise error_type(f"cannot {action}: {_reason(error)}") from error


def _code(error: Exception) -> str:
    """The S3 error code; "" if there is none. It is also read from text/xml responses, which minio does not parse."""
    if isinstance(error, S3Error):
        return error.code or ""
    match = _CODE.search(str(error)) if isinstance(error, InvalidResponseError) else None
    return match[1] if match else ""


def _reason(error: Exception) -> str:
    """A short reason without addresses, since clients see it."""
    cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
    return _code(error) or type(cause).__name__
