"""Artifacts into files: whole and checked, or not at all."""

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


def download(transport: Transport, path: str, file: Path, tries: int) -> str:
    """Fetch the artifact at `path` into `file`; the SHA-256 of its bytes.

    The file appears under its name when all bytes are there and are those that the service has; a connection that
    breaks is taken up again where it broke. Raises ApiError, OSError.
    """
    with _appearing(file) as part:
        return fetch(transport, path, part, tries)


def fetch(transport: Transport, path: str, to: BufferedRandom | BytesIO, tries: int) -> str:
    """Fill `to`, which is empty, with the artifact at `path`; the SHA-256 of its bytes. Raises ApiError."""
    expected = _fill(transport, path, to, tries) or _told(transport, path)
    to.seek(0)
    found = hashlib.file_digest(to, "sha256").hexdigest()
    if expected != found:
        raise DownloadError(f"{path}: expected bytes of SHA-256 {expected or 'unknown'}, got {found}")
    return found


@contextmanager
def _appearing(file: Path) -> Iterator[BufferedRandom]:
    """A file under another name beside `file`, that gets its name if all goes well and is removed if not."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("x+b") as opened:
            yield opened
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _fill(transport: Transport, path: str, to: BufferedRandom | BytesIO, tries: int) -> str | None:
    """Fill `to`; the SHA-256 that the answer's ETag names, None if it names none (storage has ETags of its own)."""
    for attempt in count():
        have = to.tell()
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with transport.stream(path, headers, _READ_SECONDS, follow_redirects=True) as answer:
                if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
                    to.seek(0)
                    to.truncate()
                for piece in answer.iter_bytes():
                    to.write(piece)
                etag = _SHA256.fullmatch(answer.headers.get("etag", ""))
                return etag[1] if etag else None
        except (httpx.TransportError, UnavailableError) as error:
            if attempt >= tries:
                raise (transport.unreachable(error) if isinstance(error, httpx.TransportError) else error) from error
            transport.again(f"{path} broke off after {to.tell()} bytes", attempt)
    raise AssertionError("count() does not end")


def _told(transport: Transport, path: str) -> str | None:
    """The SHA-256 that the service itself names."""
    answer = transport.request("HEAD", path)
    etag = _SHA256.fullmatch(answer.headers.get("etag", ""))
    return etag[1] if etag else None
