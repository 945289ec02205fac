"""Between two renewals of a lease, a cancel is detected without a write."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import LeaseLostError, StageCancelledError
from service.jobs import execution
from service.jobs.kinds import RoundSpec
from service.service import Service, cancel_job, create_job
from tests.service import round_body, settings_for
from tests.statements import statements
from worker.heartbeat import Heartbeat
from worker.watchdog import Watchdog

PATIENCE_SECONDS = 60


def until_stopped(heartbeat: Heartbeat) -> None:
    """Check until the stage must stop, which `check` raises."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        heartbeat.check()
        time.sleep(0.01)
    raise AssertionError("the stage was not asked to stop")


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_cancel_or_a_lost_lease_stops_a_stage_before_the_next_renewal(
    tmp_path: Path, database_url: str, is_lost: bool
) -> None:
    times = {"lease_seconds": 7200, "heartbeat_seconds": 3600, "stop_check_seconds": 0.02}
    service = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=database_url, **times))
    job_id = create_job(service, RoundSpec.model_validate(round_body()))
    claim = execution.claim(service.uow, service.settings, "w")
    assert claim is not None

    bench: Any = SimpleNamespace(uow=service.uow, settings=service.settings, watchdog=Watchdog(service.settings))
    with Heartbeat(bench, claim, threading.Event()) as heartbeat, statements(service.uow.engine) as sent:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any("cancel_requested_at" in statement for statement, _ in sent):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        heartbeat.check()
        assert not any(statement.startswith("UPDATE") for statement, _ in sent)

        if is_lost:
            execution.requeue_stages_of(service.uow, service.settings, "w")
        else:
            cancel_job(service, job_id)
        with pytest.raises(LeaseLostError if is_lost else StageCancelledError):
            until_stopped(heartbeat)
    service.close()
