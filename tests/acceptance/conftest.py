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


@pytest.fixture(scope="module", params=[EMBEDDED, DEPLOYED])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pipeline: Path
) -> Iterator[Deployment]:
    """An installation in each mode, as its users start it. A module may name changed settings as SETTINGS."""
    changes = getattr(request.module, "SETTINGS", {})
    with deployment(request.param, tmp_path_factory.mktemp(request.param), pipeline, **changes) as made:
        yield made
