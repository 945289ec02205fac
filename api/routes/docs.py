"""GET /docs: Swagger UI, the only page that loads scripts from another host."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

router = APIRouter()
_SCRIPTS = "https://cdn.jsdelivr.net"
_POLICY = (
    f"default-src 'self'; script-src 'unsafe-inline' {_SCRIPTS}; style-src 'unsafe-inline' {_SCRIPTS}; "
    "img-src 'self' data: https://fastapi.tiangolo.com; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@router.get("/docs", include_in_schema=False)
def get_docs() -> HTMLResponse:
    """Return the Swagger UI page."""
    page = get_swagger_ui_html(openapi_url="/openapi.json", title="D-Fusion")
    page.headers["Content-Security-Policy"] = _POLICY
    return page
