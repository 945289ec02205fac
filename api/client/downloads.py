"""Downloads of artifacts, with resume after broken connections and verification by SHA-256."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from io import BufferedRandom, BytesIO
from itertools import count
from pathlib import Path

import httpx

from api.client.errors import DownloadError, UnavailableError
from api.client.transport import Transport

_READ_SECONDS = 60.0
_SHA256 = re.compile(r'(?:W/)?"([0-9a-f]{64})"')


def download(transport: Transport, path: str, file: Path, retries: int) -> str:
    """Download the artifact at `path` to a file.

    The file appears only if the download is complete and verified. A broken download is resumed where it stopped.

    Returns:
        The SHA-256 of the file.

    Raises:
        ApiError: The artifact cannot be downloaded.
        DownloadError: The SHA-256 is not the one that the service declares.
        OSError: The file cannot be written.
    """
    with _atomic_file(file) as part:
        return fetch(transport, path, part, retries)


def fetch(transport: Transport, path: str, target: BufferedRandom | BytesIO, retries: int) -> str:
    """Download the artifact at `path` to an empty file or buffer. Returns the SHA-256. Raises ApiError."""
    expected = _write_to(target, transport, path, retries) or _declared_sha256(transport, path)

    target.seek(0)
    actual = hashlib.file_digest(target, "sha256").hexdigest()
    if actual != expected:
        raise DownloadError(f"{path}: expected bytes of SHA-256 {expected or 'unknown'}, got {actual}")
    return actual


@contextmanager
def _atomic_file(file: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file next to `file`. It is renamed to `file` on success, and removed on failure."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("x+b") as opened:
            yield opened
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _write_to(target: BufferedRandom | BytesIO, transport: Transport, path: str, retries: int) -> str | None:
    """Write the artifact to `target`.

    Returns:
        The SHA-256 in the ETag of the response, or None: the ETags of object storage contain other values.
    """
    for attempt in count():
        offset = target.tell()
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"

        try:
            with transport.stream(path, headers, _READ_SECONDS, follow_redirects=True) as response:
                if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                    target.seek(0)
                    target.truncate()
                for chunk in response.iter_bytes():
                    target.write(chunk)
                return _sha256_in(response)
        except (httpx.TransportError, UnavailableError) as error:
            if attempt >= retries:
                raise (transport.unreachable(error) if isinstance(error, httpx.TransportError) else error) from error
            transport.pause_before_retry(f"the download of {path} stopped after {target.tell()} bytes", attempt)
    raise AssertionError("count() does not end")


def _declared_sha256(transport: Transport, path: str) -> str | None:
    """Ask the service for the SHA-256 of an artifact."""
    return _sha256_in(transport.request("HEAD", path))


def _sha256_in(response: httpx.Response) -> str | None:
    """Return the SHA-256 in the ETag, or None if the ETag is not a SHA-256."""
    etag = _SHA256.fullmatch(response.headers.get("etag", ""))
    return etag[1] if etag else None
