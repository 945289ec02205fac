"""Route that lists the workers."""

from __future__ import annotations

from fastapi import APIRouter

from api.access import require_scope
from api.converters.workers import worker_out
from api.deps import ServiceDep
from api.wire.workers import WorkersOut
from service.db.queries import jobs, workers

router = APIRouter(tags=["workers"], dependencies=[require_scope("read")])


@router.get("/workers")
def list_workers(service: ServiceDep) -> WorkersOut:
    """List the workers seen within the last day, with their stages."""
    with service.uow.reading() as session:
        now = jobs.now(session)
        stages = workers.stages_in_work(session)
        silent_after = service.settings.silent_seconds
        rows = workers.all_workers(session)
        return WorkersOut(data=[worker_out(row, stages.get(row.name), now, silent_after) for row in rows])
