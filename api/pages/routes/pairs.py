"""Routes of the pages of pairs: the queue, and the review of a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.pairs import pair_out
from api.deps import CallerDep, ServiceDep
from api.pages.negotiation import PageRoute
from api.pages.pair_tools import denoising_of, differences, fusion_fields, measures
from api.pages.pair_views import PairView, pair_view
from api.pages.queries import FormParameters, filters_of, link, page_links
from api.pages.render import render
from api.pages.reproduction import again_of_pair
from api.routes.results import PairListParameters, list_pairs
from api.routes.verdicts import AgreementParameters, get_agreement
from api.wire.common import PERSON_NAME_LENGTH, ListOut
from api.wire.pairs import PairOut
from service.db.queries import jobs, prompt_sets, results, verdicts
from service.db.queries.pages import encode_cursor
from service.db.tables import Pair
from service.errors import InvalidRequestError
from service.keys import Caller
from service.service import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")])
_REVIEWER_COOKIE = "dfusion_reviewer"
_PAGES_TO_SEARCH = 10
"""Pages that are read for the next pair. A page reads a limited number of rows, of which none may match."""


class PairQueueParameters(FormParameters, PairListParameters):
    """Filters of the queue of pairs."""

    limit: int = Field(24, ge=1, le=200)


class AgreementFormParameters(FormParameters, AgreementParameters):
    """The pairs whose verdicts are compared."""


@router.get("/pairs")
def show_pairs(
    request: Request, service: ServiceDep, caller: CallerDep, filters: Annotated[PairQueueParameters, Query()]
) -> Response:
    """Show pairs with small images, oldest first."""
    reviewer = reviewer_of(request, caller)
    queue = Queue(service, caller, filters, reviewer)
    page = queue.page()
    unjudged = filters.model_copy(update={"judged_by_me": False})
    first_unjudged = Queue(service, caller, unjudged, reviewer).next_after(None)
    chosen = filters_of(filters)
    compared = {"job": filters.job, "prompt_set": filters.prompt_set}
    return render(
        request,
        "pairs.html",
        agreement_url=link("/verdicts/agreement", {}, **compared) if filters.cursor is None else None,
        pairs=[pair_view(pair, reviewer) for pair in page.data],
        filters=filters,
        chosen=chosen,
        pair_link=lambda pair_id: link(f"/pairs/{pair_id}", chosen),
        review_url=first_unjudged,
        **page_links("/pairs", chosen, filters.cursor, page.next_cursor),
    )


@router.get("/pairs/{pair_id}")
def show_pair(
    pair_id: str,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    filters: Annotated[PairQueueParameters, Query()],
) -> Response:
    """Show a pair for review. The filters are those of the queue, whose next pair is linked."""
    reviewer = reviewer_of(request, caller)
    chosen = filters_of(filters)
    with service.uow.reading() as session:
        row = results.get_pair(session, pair_id)
        view = view_of(session, row, reviewer)
        job = jobs.get(session, view.pair.job)
        denoising = denoising_of(session, row)
    again = again_of_pair(view, job.spec)
    return render(
        request,
        "pair.html",
        view=view,
        again=again,
        denoising=denoising,
        fusion_fields=fusion_fields(again, view.items),
        run_title=jobs.label_of(job),
        page_url=link(f"/pairs/{pair_id}", chosen),
        queue_url=link("/pairs", chosen),
        next_url=Queue(service, caller, filters, reviewer).next_after(pair_id),
        is_inspection=False,
    )


@router.get("/pairs/{pair_id}/compare/{other_id}")
def show_comparison(pair_id: str, other_id: str, request: Request, service: ServiceDep) -> Response:
    """Show two fusions of the same base and reference side by side, with the settings that differ."""
    with service.uow.reading() as session:
        rows = [results.get_pair(session, row_id) for row_id in (pair_id, other_id)]
        if len({(row.base_id, row.reference_id) for row in rows}) > 1:
            raise InvalidRequestError(f"expected pairs of one base and reference, got {pair_id} and {other_id}")
        before, after = (view_of(session, row, None) for row in rows)
        old_spec, new_spec = (jobs.get(session, row.job_id).spec for row in rows)
    thresholds = (before.pair.thresholds or [], after.pair.thresholds or [])
    return render(
        request,
        "pair_comparison.html",
        before=before,
        after=after,
        differences=list(differences(old_spec, new_spec, thresholds)),
        measures=list(measures(before, after)),
    )


@router.get("/verdicts/agreement")
def show_agreement(
    request: Request, service: ServiceDep, caller: CallerDep, filters: Annotated[AgreementFormParameters, Query()]
) -> Response:
    """Show how well reviewers agree. The list of pairs loads this page as a panel."""
    return render(request, "agreement.html", agreement=get_agreement(service, caller, filters), filters=filters)


def reviewer_of(request: Request, caller: Caller) -> str | None:
    """The reviewer who reads a page: the name of the API key, or without keys that of a cookie, which a script sets."""
    if caller.name is not None:
        return caller.name
    return unquote(request.cookies.get(_REVIEWER_COOKIE, "")).strip()[:PERSON_NAME_LENGTH] or None


def view_of(session: Session, row: Pair, reviewer: str | None) -> PairView:
    """The view of a pair for this reviewer, with the items of its prompt and what is stored of its samples."""
    samples = results.samples(session, results.sides_of([row]))
    pair = pair_out(row, samples, verdicts.of_pairs(session, [row.id]))
    items = [] if row.prompt_set_id is None else prompt_sets.items_of(session, row.prompt_set_id, row.prompt_index)
    stored = {sample_id for sample_id, sample in samples.items() if sample.trajectory_artifact_id is not None}
    return pair_view(pair, reviewer, items, frozenset(stored))


@dataclass(frozen=True)
class Queue:
    """The pairs that match the filters, as a reviewer goes through them."""

    service: Service
    caller: Caller
    filters: PairQueueParameters
    reviewer: str | None

    def page(self, **position: Any) -> ListOut[PairOut]:
        """A page of the queue, by default that of the filters. `position` changes filters."""
        return list_pairs(
            self.service, self.caller, self.filters.model_copy(update={"reviewer": self.reviewer, **position})
        )

    def next_after(self, pair_id: str | None) -> str | None:
        """The link to the next pair after this one, or to the first; None at the end."""
        chosen = filters_of(self.filters)
        position: dict[str, Any] = {"limit": 1, "cursor": None}
        if pair_id is not None:
            # ids sort by time, so that the pair alone is a position; with a filter by time, a cursor has another form
            position |= {"cursor": encode_cursor(pair_id), "created_after": None, "created_before": None}

        created_before = self.filters.created_before
        for _ in range(_PAGES_TO_SEARCH):
            page = self.page(**position)
            if page.data:
                [pair] = page.data
                is_too_late = created_before is not None and pair.created_at >= created_before
                return None if is_too_late else link(f"/pairs/{pair.id}", chosen)
            if not page.has_more:
                return None
            position["cursor"] = page.next_cursor
        return None
