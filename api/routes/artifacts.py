"""Routes that return the bytes of artifacts, in full or in part."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Response, status
from fastapi.responses import RedirectResponse, StreamingResponse

from api.access import require_scope
from api.deps import ServiceDep
from api.errors import problem
from api.openapi import ARTIFACT, ARTIFACT_HEAD
from service.db.queries import results
from service.db.tables import Artifact

router = APIRouter(tags=["artifacts"], dependencies=[require_scope("read")])
_SUFFIXES = {"image/png": ".png", "application/vnd.safetensors": ".safetensors", "application/json": ".json"}
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get("/artifacts/{artifact_id}", response_class=Response, responses=ARTIFACT)
def get_artifact(
    artifact_id: str,
    service: ServiceDep,
    range_header: Annotated[str | None, Header(alias="Range")] = None,
    if_none_match: Annotated[str | None, Header()] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """Return an artifact's bytes, or redirect to a temporary address of them.

    The ETag is the SHA-256 of the bytes, which never change.
    """
    with service.uow.reading() as session:
        row = results.get_artifact(session, artifact_id)
    headers = _headers(row)
    etag = headers["ETag"]
    if if_none_match is not None and _matches(if_none_match, etag):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)

    public_url = service.store.public_url(row.key, row.media_type)
    if public_url is not None:
        return RedirectResponse(public_url, status.HTTP_307_TEMPORARY_REDIRECT, {"Cache-Control": "no-store"})

    start = 0
    stop = row.size_bytes
    code = status.HTTP_200_OK
    byte_range = _RANGE.fullmatch(range_header.strip()) if range_header and if_range in (None, etag) else None
    if byte_range and (byte_range[1] or byte_range[2]):
        start, stop = _span(byte_range[1], byte_range[2], row.size_bytes)
        if start >= stop:
            full_size = {"Content-Range": f"bytes */{row.size_bytes}"}
            detail = f"the artifact has {row.size_bytes} bytes"
            return problem(status.HTTP_416_RANGE_NOT_SATISFIABLE, "range_not_satisfiable", detail, headers=full_size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{row.size_bytes}"
        code = status.HTTP_206_PARTIAL_CONTENT

    headers["Content-Length"] = str(stop - start)
    return StreamingResponse(service.store.read(row.key, start, stop), code, headers, media_type=row.media_type)


@router.head("/artifacts/{artifact_id}", response_class=Response, responses=ARTIFACT_HEAD)
def head_artifact(artifact_id: str, service: ServiceDep) -> Response:
    """Return the headers of GET without the bytes. Never redirects."""
    with service.uow.reading() as session:
        row = results.get_artifact(session, artifact_id)
    return Response(headers=_headers(row) | {"Content-Length": str(row.size_bytes)}, media_type=row.media_type)


def _headers(row: Artifact) -> dict[str, str]:
    return {
        "ETag": f'"{row.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": f'inline; filename="{_file_name(row)}"',
    }


def _file_name(row: Artifact) -> str:
    """The name of the file that a browser saves: the slot and the id of the artifact."""
    suffix = _SUFFIXES.get(row.media_type, "")
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', row.slot)}-{row.id}{suffix}"


def _matches(header: str, etag: str) -> bool:
    candidates = [candidate.strip().removeprefix("W/") for candidate in header.split(",")]
    return "*" in candidates or etag in candidates


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """Convert a byte range to start and stop; the span is empty if the range lies beyond the end."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), size if not last else min(int(last) + 1, size)
