"""Chromium for the tests of the pages. A module that imports this one is skipped without Chromium or Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.main import create_app
from service.service import Service
from tests.live_service import serving
from tests.service import settings_for
from tests.unit.api.pages.conftest import ADMIN

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed: apt install chromium", allow_module_level=True)

expect = playwright.expect
expect.set_options(timeout=60_000)  # on a busy machine
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--process-per-site",
    "--renderer-process-limit=1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def launched() -> Iterator[Any]:
    """A browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_OPTIONS)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Live:
    """The application on a port."""

    url: str
    service: Service

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        """The JSON of a path, with the key of the administrator."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        return dict(httpx.get(self.url + path, params=parameters, headers=headers, trust_env=False).json())


@contextmanager
def live(folder: Path, port: int = 0, pipeline: Path | None = None, **changes: Any) -> Iterator[Live]:
    """The application with its data in the folder, on this port or a free one. Without a pipeline, no stage can run."""
    app = create_app(settings_for(folder, pipeline or folder / "tiny", **changes))
    with serving(app, port=port) as used:
        yield Live(f"http://127.0.0.1:{used}", app.state.service)


_idle: dict[tuple[Any, str], list[Any]] = {}
"""Contexts without history, by browser and URL. In a new context, Chromium would start a process for each page."""


@contextmanager
def watched_page(browser: Any, url: str, *expected: str) -> Iterator[Any]:
    """A page in a browser without history. Raises AssertionError if it reports errors other than `expected`."""
    idle = _idle.setdefault((browser, url), [])
    context = idle.pop() if idle else _new_context(browser, url)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    _forget_history(context)
    idle.append(context)
    assert [error for error in errors if not any(part in error for part in expected)] == []


def _new_context(browser: Any, url: str) -> Any:
    """A context whose first page is a file of the application. It keeps the process of the pages alive."""
    context = browser.new_context(base_url=url, viewport={"width": 1280, "height": 900})
    context.new_page().goto("/static/style.css")
    return context


def _forget_history(context: Any) -> None:
    context.set_offline(False)
    context.clear_cookies()
    context.pages[0].evaluate("localStorage.clear()")


def stored(page: Any) -> None:
    """Wait until the outbox is empty."""
    page.wait_for_function(
        "() => Object.keys(localStorage).every(k => !k.startsWith('dfusion.outbox') || localStorage[k] === '[]')"
    )
