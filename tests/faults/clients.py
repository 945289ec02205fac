"""Faults around requests: clients repeat and cancel, the service is killed, processes migrate at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from sqlalchemy import inspect, text

from service.db.tables import Table
from service.db.unit_of_work import make_engine
from tests.deployment import DEPLOYED, PATIENCE_SECONDS, ROOT, Deployment
from tests.faults.site import ROUND, SAMPLING, Site
from tests.forking import fork

MIGRATIONS = 8


@contextmanager
def submitting(installed: Deployment, path: str, body: dict[str, Any], key: str) -> Iterator[list[str]]:
    """Submit a job from a thread during the block, with this Idempotency-Key, until there is a response.

    Yields a list; at the end of the block it contains the job's id.
    """
    accepted: list[str] = []

    def submit() -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with installed.client() as client:
            while time.monotonic() < deadline:
                try:
                    response = client.post(path, json=body, headers={"Idempotency-Key": key})
                except httpx.TransportError:
                    time.sleep(0.02)
                    continue
                if response.status_code == 202:
                    accepted.append(installed.accept(response))
                    return
                time.sleep(0.1)

    client = threading.Thread(target=submit)
    client.start()
    try:
        yield accepted
    finally:
        client.join()
    assert accepted, "the client got no response"


def kill_the_service(site: Site, dice: random.Random) -> int:
    """The service is killed while it takes a request, which the client repeats with its key: it makes one job."""
    installed = site.installed
    body = SAMPLING | {"seed": dice.randrange(1 << 20)}
    key = str(dice.random())
    with submitting(installed, "/samplings", body, key) as accepted:
        time.sleep(dice.uniform(0, 0.06))
        installed.process["api"].kill()
        installed.process["api"].wait()
        installed.start_api()
    again = installed.post("/samplings", body, **{"Idempotency-Key": key})
    assert accepted == [again]
    return 1


def cancel_a_job(site: Site, dice: random.Random) -> int:
    """A job is cancelled at a random time. Cancel or completion wins."""
    installed = site.installed
    job_id = installed.post("/rounds", ROUND)
    time.sleep(dice.expovariate(1))
    with installed.client() as client:
        response = client.post(f"/jobs/{job_id}/cancel")
    assert response.status_code == 202, response.text
    job = installed.ended(job_id)
    assert job["state"] in ("cancelled", "succeeded")
    assert {stage.state for stage in installed.stages(job_id)} <= {"succeeded", job["state"]}
    return 1


def migrate_at_once(site: Site, dice: random.Random) -> int:
    """Eight processes migrate a new database at once; in half of the rounds one of them is killed meanwhile."""
    installed = site.installed
    name = f"migrations-{dice.randrange(1 << 30)}"
    folder = installed.folder / name
    folder.mkdir()
    if installed.mode == DEPLOYED:
        url = site.servers.postgres.create_database()
    else:
        url = f"sqlite:///{folder / 'new.db'}"
    settings = installed.settings.model_copy(update={"database_url": url, "data_dir": folder})
    environment = settings.for_child() | {"PYTHONPATH": str(ROOT)}

    program = ("-m", "service.db.migrate")
    processes = [fork(program, folder, environment, installed.log(name)) for _ in range(MIGRATIONS)]
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, 0.5))
        processes.pop(dice.randrange(MIGRATIONS)).kill()
    assert [process.wait(PATIENCE_SECONDS) for process in processes] == [0] * len(processes), installed.logs()[-5000:]

    engine = make_engine(url)
    with engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {*Table.metadata.tables, "alembic_version"}
        assert len(connection.scalars(text("SELECT version_num FROM alembic_version")).all()) == 1
    engine.dispose()
    return MIGRATIONS
