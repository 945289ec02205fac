"""Markers by folder, long tests, and grouping of tests for pytest-xdist."""

import gc
import os
import shutil
import ssl
import tempfile
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

_MEMORY = Path("/dev/shm")
_ENOUGH_MEMORY = 6 << 30
_GC_THRESHOLDS = (10_000, 10, 30)

# tests sync thousands of small files, and PostgreSQL copies a template of 300 files for each database
if "TMPDIR" not in os.environ and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ENOUGH_MEMORY:
    os.environ["TMPDIR"] = str(_MEMORY)
    tempfile.tempdir = None

ssl.create_default_context = cache(ssl.create_default_context)  # 0.03 s for each httpx client
gc.disable()  # until all tests are imported: the collector would scan torch's and diffusers' objects repeatedly


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that are marked `long`, too")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Import torch and diffusers once for all processes of pytest-xdist."""
    from tests.forking import fork_test_processes

    fork_test_processes()


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that start servers, and run the tests of a file in one process of pytest-xdist: they share fixtures.

    Long tests are left out without `--long`.

    Acceptance tests are grouped by the installation that they share (tests/acceptance/conftest.py).
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("acceptance", "integration"):
            item.add_marker("servers")
        if folder == "acceptance":
            item.add_marker("slow")
        else:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(TESTS))))

    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]

    # slow files first, so that none of them runs alone at the end
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Let the garbage collector run again, but rarely. It ignores what the imports created."""
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """After the last test, find resources that were not closed: a warning about one is an error."""
    if nextitem is None:
        gc.collect()
