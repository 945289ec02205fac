from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.core.service import Service
from api.main import create_app
from tests.service import settings_for


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """The application without a worker: nothing that it queues is ever done."""
    app = create_app(settings_for(tmp_path / "data", tmp_path / "tiny"))
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def service(client: TestClient) -> Service:
    """The service behind `client`."""
    found = client.app.state.service  # type: ignore[attr-defined]
    assert isinstance(found, Service)
    return found
