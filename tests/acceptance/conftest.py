"""Fixtures of acceptance tests. One thread per process, since more threads only slow these small nets down."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import DEPLOYED, EMBEDDED, Deployment, deployment


def pytest_collectstart() -> None:
    """Import torch where tests are collected. pytest-xdist's first process collects none, and would need seconds."""
    import torch

    from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random pipeline. Without a middle block, jobs take a tenth less time."""
    from tests.nets import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(has_middle=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Deployment]:
    """An embedded service as users start it, shared by all tests that need no special settings."""
    with deployment(EMBEDDED, tmp_path_factory.mktemp(EMBEDDED), pipeline, forks=False) as installation:
        yield installation


@pytest.fixture(scope="module", params=[EMBEDDED, DEPLOYED])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pipeline: Path
) -> Iterator[Deployment]:
    """An installation in each mode. Modules can change settings with SETTINGS.

    The programs of deployed mode are forks: test_compose.py starts them as users do.
    """
    changes = getattr(request.module, "SETTINGS", {})
    if request.param == EMBEDDED and not changes:
        yield request.getfixturevalue("embedded")
        return
    with deployment(request.param, tmp_path_factory.mktemp(request.param), pipeline, **changes) as installation:
        yield installation


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all tests of an installation in one process of pytest-xdist. Tests without a shared one are not grouped."""
    for item in items:
        group = _installation(item) if isinstance(item, pytest.Function) else None
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def _installation(item: pytest.Function) -> str | None:
    """Return the name of the installation that the test shares with others, if any."""
    mode = item.callspec.params.get("installed") if hasattr(item, "callspec") else None
    if "embedded" in item.fixturenames or (mode == EMBEDDED and not hasattr(item.module, "SETTINGS")):
        return "shared embedded service"
    return None if mode is None else f"{item.module.__name__} {mode}"
