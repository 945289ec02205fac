"""Who does the work."""

from __future__ import annotations

from fastapi import APIRouter

from api.access import needs
from api.converters.workers import worker_out
from api.deps import ServiceDep
from api.wire.workers import WorkersOut
from service.db.queries import jobs, workers

router = APIRouter(tags=["workers"], dependencies=[needs("read")])


@router.get("/workers")
def list_workers(service: ServiceDep) -> WorkersOut:
    """The workers that were seen within a day, and what they do."""
    with service.uow.reading() as session:
        now, in_work = jobs.now(session), workers.stages_in_work(session)
        silent_after = 3 * service.settings.presence_seconds
        rows = workers.all_workers(session)
        return WorkersOut(data=[worker_out(row, in_work.get(row.name), now, silent_after) for row in rows])
