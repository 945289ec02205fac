"""The application with drawn results, shared by the tests of the pages, which change only verdicts and keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.main import create_app
from service.service import Service
from tests.drawn_results import DrawnRun, draw_run
from tests.service import service_of, settings_for

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
ADMIN = "dfk_" + "b2" * 20


@dataclass(frozen=True)
class Site:
    """The application, opened as by programs and as by a browser, and its run."""

    client: TestClient
    browser: TestClient
    service: Service
    run: DrawnRun


def site_of(folder: pytest.TempPathFactory, **changes: object) -> Iterator[Site]:
    """The application with these settings and a drawn run."""
    data = folder.mktemp("pages")
    app = create_app(settings_for(data, data / "tiny", **changes))
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
        browser = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False, headers={"Accept": BROWSER})
        yield Site(client, browser, service_of(client), draw_run(service_of(client)))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Without API keys."""
    yield from site_of(tmp_path_factory)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With API keys."""
    yield from site_of(tmp_path_factory, auth=True, bootstrap_admin_key=SecretStr(ADMIN))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser. Modules that use it import `browser`, which skips them without Chromium."""
    from tests.unit.api.pages.browser import launched

    with launched() as browser:
        yield browser
