"""Routes of the pages' styles, scripts and icon. They are open, since the sign-in page needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter, Request
from fastapi.responses import Response

router = APIRouter(include_in_schema=False)
_TYPES: Mapping[str, str] = MappingProxyType(
    {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
)


def _read() -> dict[str, bytes]:
    """The files of the folder `static`, by path."""
    folder = files("api.pages") / "static"
    return {f"/assets/{file.name}": file.read_bytes() for file in folder.iterdir()}


_CONTENT = _read()
ASSETS = frozenset(_CONTENT)
"""The paths of the files."""


def _route(path: str) -> Callable[[Request], Awaitable[Response]]:
    content = _CONTENT[path]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # browsers ask whether a file has changed, so that a new version of the service is not mixed with old files
    headers = {"ETag": etag, "Cache-Control": "no-cache"}

    async def get_asset(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[path.rpartition(".")[2]])

    return get_asset


for _path in sorted(_CONTENT):
    router.get(_path)(_route(_path))
