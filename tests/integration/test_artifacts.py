"""Artifacts on an S3 server, served by the API itself or by redirects to presigned URLs."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient
from sqlalchemy import select

from api.main import create_app
from service.db.clock import now_seconds
from service.db.queries import jobs, stages
from service.db.tables import Artifact
from service.ids import IdKind, new_id
from service.jobs.collector import collect
from service.jobs.kinds import RoundSpec
from service.service import Service, create_job
from tests.servers import S3Server, s3_server
from tests.service import round_body, settings_for, work_until_idle

DATA = b"\x89PNG and so on"


@contextmanager
def serving(server: S3Server, folder: Path, **changes: Any) -> Iterator[tuple[TestClient, str]]:
    """The application and the path of an artifact."""
    settings = server.settings(f"bucket-{secrets.token_hex(4)}") | changes
    app = create_app(settings_for(folder / "data", folder / "tiny", **settings))
    with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client, f"/artifacts/{add_artifact(app.state.service)}"


def add_artifact(service: Service) -> str:
    job_id = create_job(service, RoundSpec.model_validate(round_body()))
    with service.store.scratch() as scratch:
        (scratch / "image").write_bytes(DATA)
        with service.uow.writing() as session:
            stage_id = stages.of_job(session, job_id)[0].id
            stored = service.store.put(job_id, stage_id, "image", scratch / "image")
            row = Artifact(
                id=new_id(IdKind.ARTIFACT),
                job_id=job_id,
                stage_id=stage_id,
                slot="image",
                key=stored.key,
                sha256=stored.sha256,
                size_bytes=stored.size_bytes,
                media_type="image/png",
                created_at=now_seconds(),
            )
            session.add(row)
    return row.id


def test_bytes_are_handed_on(s3: S3Server, tmp_path: Path) -> None:
    with serving(s3, tmp_path) as (client, path):
        whole = client.get(path)
        assert (whole.status_code, whole.content, whole.headers["content-type"]) == (200, DATA, "image/png")
        part = client.get(path, headers={"Range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, b"PNG")
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("etag", "content-length", "content-type", "accept-ranges"):
            assert head.headers[name] == whole.headers[name]
        missing = f"/artifacts/{new_id(IdKind.ARTIFACT)}"
        assert (client.get(missing).status_code, client.head(missing).status_code) == (404, 404)


def test_clients_are_sent_to_public_storage(s3: S3Server, tmp_path: Path) -> None:
    with serving(s3, tmp_path, s3_public_endpoint=f"localhost:{s3.port}") as (client, path):
        sent = client.get(path)
        assert (sent.status_code, sent.headers["cache-control"]) == (307, "no-store")
        location = sent.headers["location"]
        assert location.startswith(f"http://localhost:{s3.port}/")
        response = httpx.get(location)
        assert (response.content, response.headers["content-type"]) == (DATA, "image/png")
        head = client.head(path)
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(DATA)))
        assert client.get(path, headers={"If-None-Match": head.headers["etag"]}).status_code == 304


def test_unavailable_storage_is_reported(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    with ExitStack() as stack:
        with s3_server(tmp_path / "s3") as server:
            client, path = stack.enter_context(serving(server, tmp_path))
        response = client.get(path)
    assert (response.status_code, response.json()["code"]) == (503, "storage")
    assert "retry-after" in response.headers
    assert "127.0.0.1" not in response.text


def test_a_whole_round_on_an_s3_server(s3: S3Server, tmp_path: Path, pipeline: Path) -> None:
    bucket = f"bucket-{secrets.token_hex(4)}"
    service = Service.open(settings_for(tmp_path, pipeline, checkpoint_seconds=1e-6, **s3.settings(bucket)))
    job_id = create_job(service, RoundSpec.model_validate(round_body()))
    work_until_idle(service)
    with service.uow.reading() as session:
        job = jobs.get(session, job_id)
        named = set(session.scalars(select(Artifact.key)))
    assert (job.state, job.error_message) == ("succeeded", None)
    collect(service.uow, service.store, service.settings)
    assert {stored.key for stored in service.store.objects()} == named
    service.close()
