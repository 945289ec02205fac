"""A backup as docs/deploy.md describes it, restored on other servers: the service goes on."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from api.main import create_app
from tests import invariants
from tests.installation import Installation
from tests.servers import PostgresServer, S3Server
from tests.service import round_body, settings_for, work_until_idle

BODY: dict[str, Any] = {"prompts": round_body()["prompts"][:1], "fusion": None, "evaluation": None}


@contextmanager
def opened(folder: Path, pipeline: Path, url: str, s3: S3Server, bucket: str) -> Iterator[Installation]:
    settings = settings_for(folder, pipeline, database_url=url, **s3.settings(bucket))
    with TestClient(create_app(settings)) as client:
        yield Installation(client)


def test_a_restored_backup_goes_on(
    tmp_path: Path, pipeline: Path, postgres: PostgresServer, postgres_url: str, s3: S3Server
) -> None:
    dump = tmp_path / "dfusion.dump"
    with opened(tmp_path / "before", pipeline, postgres_url, s3, "before") as before:
        # 1. a job that has ended, one in its middle, and one that has not started
        ended = before.run(**BODY)
        adapter = before.adapter(ended)
        middle = before.post(**BODY, seed=8)
        work_until_idle(before.service, until=lambda claim: claim.kind == "train")
        queued = before.post(**BODY, seed=9)

        # 2. the database first, then the objects; the service goes on meanwhile
        postgres.dump(postgres_url, dump)
        work_until_idle(before.service, until=lambda claim: claim.job_id == queued)
        in_between = before.run(**BODY, seed=10)
        shutil.copytree(s3.objects / "before", s3.objects / "after")
        s3.clear_cache()

    # 3. a new installation, without the old one's data folder
    restored_url = postgres.restore(dump)
    shutil.rmtree(tmp_path / "before")
    with opened(tmp_path / "after", pipeline, restored_url, s3, "after") as after:
        assert {job["id"] for job in after.all("/jobs")} == {ended["id"], middle, queued}
        assert after.client.get(f"/jobs/{in_between['id']}").status_code == 404
        assert after.adapter(ended) == adapter

        work_until_idle(after.service)
        assert [after.get(f"/jobs/{job_id}")["state"] for job_id in (middle, queued)] == ["succeeded"] * 2
        invariants.all_jobs_have_ended(after.service, {ended["id"], middle, queued})
        invariants.objects_are_those_of_their_rows(after.service)
        invariants.counts_agree(after.service)
