"""One thread: the nets are so small that more only get in each other's way."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)
from tests.nets import tiny_pipeline
from tests.servers import S3Server, s3_server

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server; each test takes a bucket of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
