import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.client import Client
from api.client.transport import Backoff
from api.main import create_app
from service.service import Service
from tests.live_service import Busy, serving
from tests.service import round_body, settings_for, work_until_idle


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


@dataclass(frozen=True)
class Live:
    """The application on a port, and a round of it that is done. Nothing works but `working`, or the test itself."""

    port: int
    service: Service
    busy: Busy
    done_job: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def working(self) -> Iterator[None]:
        """A worker in a thread, for as long as the block."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.05):
                work_until_idle(self.service)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(120)

    def client(self, port: int | None = None, pauses: list[float] | None = None) -> Client:
        """A client that does not wait between its tries, but writes down how long it would have."""
        backoff = Backoff((pauses if pauses is not None else []).append)
        return Client(f"http://127.0.0.1:{port or self.port}", trust_env=False, backoff=backoff)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A live installation with the tiny pipeline; torch is imported only for those who want it."""
    from dfusion import _torchvision_ops  # noqa: F401  (before diffusers or peft)
    from tests.nets import tiny_pipeline

    folder = tmp_path_factory.mktemp("live")
    tiny_pipeline().save_pretrained(folder / "tiny")
    app = create_app(settings_for(folder / "data", folder / "tiny"))
    busy = Busy(app)
    with serving(busy) as port:
        service: Service = app.state.service
        with Client(f"http://127.0.0.1:{port}", trust_env=False) as client:
            job = client.start_round(round_body())
            work_until_idle(service)
            assert client.job(job.id).state == "succeeded"
        yield Live(port, service, busy, job.id)
