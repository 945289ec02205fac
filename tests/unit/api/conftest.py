from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.client import Client
from api.client.transport import Backoff
from api.main import create_app
from api.wire.models import ModelDetail
from service.db.queries import results
from service.db.tables import Export
from service.ids import IdKind, new_id
from service.service import Service
from tests.live_service import Busy, serving
from tests.service import round_body, service_of, settings_for, tables_by_copy, work_until_idle, working


@pytest.fixture(scope="session", autouse=True)
def _tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Create SQLite databases by copying a migrated one."""
    with tables_by_copy(tmp_path_factory.mktemp("tables")):
        yield


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """The application without a worker, so that queued jobs do not start."""
    app = create_app(settings_for(tmp_path / "data", tmp_path / "tiny"))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def service(client: TestClient) -> Service:
    """The service behind `client`."""
    return service_of(client)


@dataclass(frozen=True)
class Live:
    """The application on a port, with one finished round. Stages run only within `working`, or in the test."""

    port: int
    service: Service
    busy: Busy
    done_job: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run a worker in a thread for the duration of the block."""
        with working(self.service):
            yield

    def client(self, port: int | None = None, pauses: list[float] | None = None) -> Client:
        """Create a client that records its pauses between retries instead of waiting."""
        backoff = Backoff((pauses if pauses is not None else []).append)
        return Client(f"http://127.0.0.1:{port or self.port}", trust_env=False, backoff=backoff)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A live service with the tiny pipeline. Imports torch here, so that other tests start without it."""
    from dfusion import _torchvision_ops  # noqa: F401  (before diffusers or peft)
    from tests.nets import tiny_pipeline

    folder = tmp_path_factory.mktemp("live")
    tiny_pipeline(has_middle=False).save_pretrained(folder / "tiny")
    app = create_app(settings_for(folder / "data", folder / "tiny"))
    busy = Busy(app)
    with serving(busy) as port:
        service: Service = app.state.service
        with Client(f"http://127.0.0.1:{port}", trust_env=False) as client:
            job = client.start_round(round_body())
            work_until_idle(service)
            assert client.job(job.id).state == "succeeded"
        yield Live(port, service, busy, job.id)


def add_export(live: Live, model: ModelDetail, image: str, recipe: dict[str, Any]) -> None:
    """Add an export of a model in the recipe's format: its file is the model's own, its preview this image."""
    assert model.adapter is not None
    with live.service.uow.writing() as session:
        row = Export(
            id=new_id(IdKind.EXPORT),
            job_id=live.done_job,
            model_id=model.id,
            format=recipe["format"],
            artifact_id=model.adapter.artifact.rpartition("/")[2],
            preview_artifact_id=image.rpartition("/")[2],
            recipe=recipe,
            statistics={},
            created_at=0,
        )
        results.add_all(session, [row])
