"""The bytes of artifacts, whole or in part."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Response, status
from fastapi.responses import RedirectResponse, StreamingResponse

from api.access import needs
from api.deps import ServiceDep
from api.errors import problem
from api.openapi import ARTIFACT, ARTIFACT_HEAD
from service.db.queries import results
from service.db.tables import Artifact

router = APIRouter(tags=["artifacts"], dependencies=[needs("read")])
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get("/artifacts/{artifact_id}", response_class=Response, responses=ARTIFACT)
def get_artifact(
    artifact_id: str,
    service: ServiceDep,
    range_header: Annotated[str | None, Header(alias="Range")] = None,
    if_none_match: Annotated[str | None, Header()] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """An artifact's bytes, or where they are for a while. Its ETag is their SHA-256; they never change."""
    with service.uow.reading() as session:
        row = results.get_artifact(session, artifact_id)
    headers = _headers(row)
    etag = headers["ETag"]
    if if_none_match is not None and _matches(if_none_match, etag):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    elsewhere = service.store.public_url(row.key, row.media_type)
    if elsewhere is not None:
        return RedirectResponse(elsewhere, status.HTTP_307_TEMPORARY_REDIRECT, {"Cache-Control": "no-store"})
    start, stop, code = 0, row.size_bytes, status.HTTP_200_OK
    asked = _RANGE.fullmatch(range_header.strip()) if range_header and if_range in (None, etag) else None
    if asked and (asked[1] or asked[2]):
        start, stop = _span(asked[1], asked[2], row.size_bytes)
        if start >= stop:
            whole = {"Content-Range": f"bytes */{row.size_bytes}"}
            detail = f"the artifact has {row.size_bytes} bytes"
            return problem(status.HTTP_416_RANGE_NOT_SATISFIABLE, "range_not_satisfiable", detail, headers=whole)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{row.size_bytes}"
        code = status.HTTP_206_PARTIAL_CONTENT
    headers["Content-Length"] = str(stop - start)
    return StreamingResponse(service.store.read(row.key, start, stop), code, headers, media_type=row.media_type)


@router.head("/artifacts/{artifact_id}", response_class=Response, responses=ARTIFACT_HEAD)
def head_artifact(artifact_id: str, service: ServiceDep) -> Response:
    """What GET would say of the artifact, without its bytes and never by a redirect."""
    with service.uow.reading() as session:
        row = results.get_artifact(session, artifact_id)
    return Response(headers=_headers(row) | {"Content-Length": str(row.size_bytes)}, media_type=row.media_type)


def _headers(row: Artifact) -> dict[str, str]:
    return {
        "ETag": f'"{row.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }


def _matches(header: str, etag: str) -> bool:
    candidates = [candidate.strip().removeprefix("W/") for candidate in header.split(",")]
    return "*" in candidates or etag in candidates


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """Start and stop of a byte range; empty where it lies beyond the end."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), size if not last else min(int(last) + 1, size)
