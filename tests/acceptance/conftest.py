"""One thread: the nets are so small that more only get in each other's way."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)
from tests.deployment import DEPLOYED, EMBEDDED, Deployment, deployment
from tests.nets import tiny_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Deployment]:
    """The embedded service that all tests share which need no settings of their own."""
    with deployment(EMBEDDED, tmp_path_factory.mktemp(EMBEDDED), pipeline) as made:
        yield made


@pytest.fixture(scope="module", params=[EMBEDDED, DEPLOYED])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pipeline: Path
) -> Iterator[Deployment]:
    """An installation in each mode, as its users start it. A module may name changed settings as SETTINGS."""
    changes = getattr(request.module, "SETTINGS", {})
    if request.param == EMBEDDED and not changes:
        yield request.getfixturevalue("embedded")
        return
    with deployment(request.param, tmp_path_factory.mktemp(request.param), pipeline, **changes) as made:
        yield made


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of an installation in one process of pytest-xdist; a test that brings its own is by itself."""
    for item in items:
        group = _installation(item) if isinstance(item, pytest.Function) else None
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def _installation(item: pytest.Function) -> str | None:
    """Which installation the test shares with others."""
    mode = item.callspec.params.get("installed") if hasattr(item, "callspec") else None
    if "embedded" in item.fixturenames or (mode == EMBEDDED and not hasattr(item.module, "SETTINGS")):
        return "shared embedded service"
    return None if mode is None else f"{item.module.__name__} {mode}"
