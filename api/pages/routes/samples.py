"""Routes of the pages of samples."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from api.access import require_scope
from api.converters.models import display_name
from api.deps import CallerDep, ServiceDep
from api.pages.negotiation import PageRoute
from api.pages.pair_tools import denoising_of, fusion_fields
from api.pages.queries import FormParameters, filters_of, link, page_links
from api.pages.render import render
from api.pages.reproduction import again_of_job, again_of_pair
from api.pages.routes.pairs import reviewer_of, view_of
from api.pages.samples import sample_card
from api.routes.results import SampleListParameters, get_sample, list_samples
from service.db.queries import jobs, prompt_sets, results
from service.states import SampleRole

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")])


class SampleGridParameters(FormParameters, SampleListParameters):
    """Filters of the grid of samples."""

    limit: int = Field(60, ge=1, le=200)


@router.get("/samples")
def show_samples(request: Request, service: ServiceDep, filters: Annotated[SampleGridParameters, Query()]) -> Response:
    """Show samples as a grid of small images, oldest first."""
    page = list_samples(service, filters)
    chosen = filters_of(filters)
    return render(
        request,
        "samples.html",
        samples=[sample_card(sample) for sample in page.data],
        filters=filters,
        chosen=chosen,
        roles=list(SampleRole),
        **page_links("/samples", chosen, filters.cursor, page.next_cursor),
    )


@router.get("/samples/{sample_id}")
def show_sample(sample_id: str, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Show a sample with its lineage, and the pair that contains it for review."""
    sample = get_sample(sample_id, service)
    with service.uow.reading() as session:
        row = results.get_sample(session, sample.id)
        items = [] if row.prompt_set_id is None else prompt_sets.items_of(session, row.prompt_set_id, row.prompt_index)
        job = jobs.get(session, sample.job)
        model = results.get_model(session, sample.model)
        pair = sample.pairs[0] if sample.pairs else None
        pair_job = job if pair is None or pair.job == job.id else jobs.get(session, pair.job)
        reviewer = reviewer_of(request, caller)
        pair_row = None if pair is None else results.get_pair(session, pair.id)
        view = None if pair_row is None else view_of(session, pair_row, reviewer)
        denoising = None if pair_row is None else denoising_of(session, pair_row)

    again = None if view is None else again_of_pair(view, pair_job.spec)

    return render(
        request,
        "sample.html",
        card=sample_card(sample),
        items=items,
        run_title=jobs.label_of(job),
        model_name=display_name(model),
        others=sample.pairs[1:],
        view=view,
        again=again,
        denoising=denoising,
        fusion_fields=fusion_fields(again, items),
        again_job=again_of_job(job.kind, job.spec),
        queue_url=link("/pairs", {"job": sample.job}),
        next_url=None,
        page_url=f"/samples/{sample.id}",
        is_inspection=True,
    )
