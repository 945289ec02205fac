"""Routes of the pages of pairs: the queue, and the review of a pair."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.pairs import pair_out
from api.deps import ServiceDep
from api.pages.negotiation import PageRoute
from api.pages.pair_views import PairView, pair_view
from api.pages.queries import FormParameters, filters_of, link, page_links
from api.pages.render import render
from api.pages.reproduction import again_of_pair
from api.routes.results import PairListParameters, list_pairs
from service.db.queries import jobs, prompt_sets, results
from service.db.queries.pages import encode_cursor
from service.db.tables import Pair
from service.service import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")])
_PAGES_TO_SEARCH = 10
"""Pages that are read for the next pair. A page reads a limited number of rows, of which none may match."""


class PairQueueParameters(FormParameters, PairListParameters):
    """Filters of the queue of pairs."""

    limit: int = Field(24, ge=1, le=200)


@router.get("/pairs")
def show_pairs(request: Request, service: ServiceDep, filters: Annotated[PairQueueParameters, Query()]) -> Response:
    """Show pairs with small images, oldest first."""
    page = list_pairs(service, filters)
    chosen = filters_of(filters)
    first_unjudged = next_pair(service, filters.model_copy(update={"judged": False}), None)
    return render(
        request,
        "pairs.html",
        pairs=[pair_view(pair) for pair in page.data],
        filters=filters,
        chosen=chosen,
        pair_link=lambda pair_id: link(f"/pairs/{pair_id}", chosen),
        review_url=first_unjudged,
        **page_links("/pairs", chosen, filters.cursor, page.next_cursor),
    )


@router.get("/pairs/{pair_id}")
def show_pair(
    pair_id: str, request: Request, service: ServiceDep, filters: Annotated[PairQueueParameters, Query()]
) -> Response:
    """Show a pair for review. The filters are those of the queue, whose next pair is linked."""
    chosen = filters_of(filters)
    with service.uow.reading() as session:
        view = view_of(session, results.get_pair(session, pair_id))
        job = jobs.get(session, view.pair.job)
    return render(
        request,
        "pair.html",
        view=view,
        again=again_of_pair(view.pair, job.spec),
        run_title=jobs.label_of(job),
        page_url=link(f"/pairs/{pair_id}", chosen),
        queue_url=link("/pairs", chosen),
        next_url=next_pair(service, filters, pair_id),
        is_inspection=False,
    )


def view_of(session: Session, row: Pair) -> PairView:
    """The view of a pair, with the items of its prompt."""
    pair = pair_out(row, results.samples(session, results.sides_of([row])))
    items = [] if row.prompt_set_id is None else prompt_sets.items_of(session, row.prompt_set_id, row.prompt_index)
    return pair_view(pair, items)


def next_pair(service: Service, filters: PairQueueParameters, after: str | None) -> str | None:
    """The link to the next pair of the queue after this one, or to the first; None at the end."""
    chosen = filters_of(filters)
    position: dict[str, Any] = {"limit": 1, "cursor": None}
    if after is not None:
        # ids sort by time, so that the pair alone is a position; with a filter by time, a cursor has another form
        position |= {"cursor": encode_cursor(after), "created_after": None, "created_before": None}

    for _ in range(_PAGES_TO_SEARCH):
        page = list_pairs(service, filters.model_copy(update=position))
        if page.data:
            [pair] = page.data
            is_too_late = filters.created_before is not None and pair.created_at >= filters.created_before
            return None if is_too_late else link(f"/pairs/{pair.id}", chosen)
        if not page.has_more:
            return None
        position["cursor"] = page.next_cursor
    return None
