"""Routes of the pages' images: stored ones from this host, scaled, or a mask as an overlay.

`/artifacts/{id}` may redirect to the storage, which the pages' policy does not allow.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response

from api.access import require_scope
from api.deps import Parameters, ServiceDep
from api.pages.images import UnreadableImageError, overlay, thumbnail
from service.db.queries import results
from service.errors import NotFoundError, StorageError

router = APIRouter(include_in_schema=False, dependencies=[require_scope("read")])
_PNG = "image/png"
_WEBP = "image/webp"
Size = Literal["128", "256", "512"]


class ImageParameters(Parameters):
    """`size`: the most pixels of a side; the original without it. `overlay`: the image is a mask."""

    size: Size | None = None
    overlay: bool = False


@router.get("/images/{artifact_id}")
def get_image(
    artifact_id: str,
    service: ServiceDep,
    parameters: Annotated[ImageParameters, Query()],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Return a stored image, which never changes, so that browsers keep it."""
    with service.uow.reading() as session:
        row = results.get_artifact(session, artifact_id)
    if row.media_type != _PNG:
        raise NotFoundError(f"expected an image, got {row.id}, which is {row.media_type}")

    variant = "overlay" if parameters.overlay else parameters.size or "full"
    etag = f'"{row.sha256}-{variant}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable"}
    if if_none_match == etag:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    if variant == "full":
        # not streamed: a browser that leaves the page would leave the file open
        content = b"".join(service.store.read(row.key, 0, row.size_bytes))
        return Response(content, headers=headers, media_type=_PNG)

    with service.store.borrow(row.key, row.sha256) as path:
        try:
            if parameters.overlay:
                return Response(overlay(path), headers=headers, media_type=_PNG)
            return Response(thumbnail(path, int(variant)), headers=headers, media_type=_WEBP)
        except UnreadableImageError as error:
            raise StorageError(f"{row.id}: {error}") from error
