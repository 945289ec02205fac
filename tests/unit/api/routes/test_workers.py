from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import update

from api.main import create_app
from service.db.clock import now_seconds
from service.db.queries import workers
from service.db.tables import Worker
from service.jobs import execution
from service.jobs.kinds import RoundSpec
from service.service import create_job
from tests.service import round_body, service_of, settings_for


def test_workers_are_listed_with_state_and_stage(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data", tmp_path / "tiny", presence_seconds=5)
    with TestClient(create_app(settings)) as client:
        service = service_of(client)
        job_id = create_job(service, RoundSpec.model_validate(round_body(evaluation=None)))
        with service.uow.writing() as session:
            for name in ("busy", "gone", "idle"):
                workers.report(session, name=name, host="h", pid=7, queues=["gpu"], device="cuda", model="tiny")
            silent = update(Worker).where(Worker.name == "gone").values(seen_at=now_seconds() - 16)
            session.execute(silent)
        claim = execution.claim(service.uow, settings, "busy")
        assert claim is not None
        listed = client.get("/workers").json()["data"]
    assert [(row["name"], row["state"]) for row in listed] == [
        ("busy", "working"),
        ("gone", "silent"),
        ("idle", "idle"),
    ]
    assert listed[0]["stage"] == {"id": claim.stage_id, "job": f"/jobs/{job_id}", "kind": "sample", "round": 1}
    assert {key: listed[2][key] for key in ("host", "pid", "queues", "device", "model", "stage")} == {
        "host": "h",
        "pid": 7,
        "queues": ["gpu"],
        "device": "cuda",
        "model": "tiny",
        "stage": None,
    }
