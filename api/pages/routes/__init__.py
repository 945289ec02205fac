"""Routes of the pages."""

from __future__ import annotations

from re import Pattern

from fastapi import APIRouter

from api.pages import assets
from api.pages.negotiation import PageRoute
from api.pages.routes import (
    charts,
    compare,
    images,
    models,
    new_run,
    pairs,
    preference_tests,
    report,
    runs,
    samples,
    sign_in,
)

_PAGES = (
    new_run.router,
    compare.router,
    runs.router,
    pairs.router,
    samples.router,
    models.router,
    preference_tests.router,
)
ROUTERS: tuple[APIRouter, ...] = (*_PAGES, sign_in.router, images.router, charts.router, report.router, assets.router)
"""All routers. They come before those of the API, whose paths the pages have."""


def page_paths() -> list[Pattern[str]]:
    """The patterns of the paths that have a page."""
    return [route.path_regex for router in _PAGES for route in router.routes if isinstance(route, PageRoute)]
