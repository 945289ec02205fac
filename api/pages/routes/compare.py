"""Route of the page that compares two runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from api.access import require_scope
from api.deps import PageParameters, ServiceDep
from api.pages.comparison import differences, images, settings_of
from api.pages.negotiation import PageRoute
from api.pages.queries import FormParameters, link, page_links
from api.pages.render import render
from api.pages.routes.runs import seconds_of, title_of
from api.routes.jobs import read_job

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")])
_PATH = "/jobs/compare"


class CompareParameters(FormParameters, PageParameters):
    """`run`: the two runs. `round`: the round whose images are shown; by default the last one of each run."""

    run: list[str] = Field(min_length=2, max_length=2)
    round: int | None = Field(None, ge=0, le=1_000_000)
    limit: int = Field(12, ge=1, le=50)


@router.get(_PATH)
def compare_runs(request: Request, service: ServiceDep, parameters: Annotated[CompareParameters, Query()]) -> Response:
    """Show two runs side by side: their curves, the settings that differ, and images of the same prompts and seeds."""
    runs = [read_job(service, job_id) for job_id in parameters.run]
    with service.uow.reading() as session:
        shown = images(session, (runs[0].id, runs[1].id), parameters.round, parameters.limit, parameters.cursor)
    rows, equal = differences(settings_of(runs[0]), settings_of(runs[1]))

    filters = {"run": [run.id for run in runs]}
    of_round = {} if parameters.round is None else {"round": parameters.round}
    return render(
        request,
        "compare.html",
        runs=runs,
        titles=[title_of(run) for run in runs],
        seconds=[seconds_of(run) for run in runs],
        differences=rows,
        equal=equal,
        images=shown,
        round=parameters.round,
        swapped_url=link(_PATH, {"run": [run.id for run in reversed(runs)]} | of_round),
        **page_links(_PATH, filters | of_round, parameters.cursor, shown.next_cursor),
    )
