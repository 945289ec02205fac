"""GET /docs: Swagger UI. Its files come from the package fastapi-offline; nothing is loaded from other hosts."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)
SCRIPT = "/docs/swagger-ui-bundle.js"
STYLES = "/docs/swagger-ui.css"
ICON = "/docs/favicon.png"
ASSETS = frozenset({SCRIPT, STYLES, ICON})
"""Paths of the files that the page loads."""
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_POLICY = (
    "default-src 'self'; script-src 'self' 'sha256-{script}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def _folder() -> Path:
    """The folder of the files. The package itself is not imported."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("fastapi-offline is not installed")
    return Path(package.origin).parent / "static"


_FOLDER = _folder()


@router.get("/docs")
def get_docs() -> HTMLResponse:
    """Return the Swagger UI page. Of inline scripts, its policy allows only the page's own."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="D-Fusion",
        swagger_js_url=SCRIPT,
        swagger_css_url=STYLES,
        swagger_favicon_url=ICON,
    )
    [script] = _INLINE_SCRIPT.findall(bytes(page.body).decode())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page.headers["Content-Security-Policy"] = _POLICY.format(script=digest)
    return page


def _file(name: str) -> Callable[[], FileResponse]:
    def get_file() -> FileResponse:
        return FileResponse(_FOLDER / name)

    return get_file


for _path in ASSETS:
    router.get(_path)(_file(_path.rpartition("/")[2]))
