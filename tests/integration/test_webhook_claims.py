"""Several processes that deliver to webhooks at once."""

from pathlib import Path

import pytest

from service.db.queries import jobs, webhooks
from service.service import Service
from service.states import WebhookEvent
from tests.service import settings_for
from tests.stored_pairs import Results


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_senders_claim_different_deliveries_and_do_not_wait_for_each_other(tmp_path: Path, database_url: str) -> None:
    service = Service.open(settings_for(tmp_path / "data", tmp_path / "tiny", database_url=database_url))
    job_id = Results.of_new_job(service).job_id
    with service.uow.writing() as session:
        hook_id = webhooks.add(session, "https://example.org/", list(WebhookEvent), "whsec_eA==").id
        for _ in range(7):
            jobs.add_event(session, job_id, "job.waiting", "the job waits for verdicts on its pairs")

    with service.uow.writing() as first, service.uow.writing() as second, service.uow.writing() as third:
        claimed = [
            {row.id for row in webhooks.claim_due(session, hook_id, 5, 60.0)} for session in (first, second, third)
        ]
    assert [len(ids) for ids in claimed] == [5, 2, 0]
    assert len(set.union(*claimed)) == 7
    with service.uow.writing() as session:
        assert webhooks.claim_due(session, hook_id, 5, 60.0) == []
    service.close()
