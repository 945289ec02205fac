"""Routes of the pages of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from api.access import require_scope
from api.converters.models import display_name
from api.deps import PageParameters, ServiceDep
from api.pages.negotiation import PageRoute
from api.pages.queries import FormParameters, filters_of, page_links
from api.pages.render import render
from api.routes.results import ModelListParameters, get_lineage, get_model, list_models
from service.db.queries import jobs, prompt_sets, results

router = APIRouter(route_class=PageRoute, include_in_schema=False, dependencies=[require_scope("read")])
_ANCESTORS = 50


class ModelTableParameters(FormParameters, ModelListParameters):
    """Filters of the table of models."""


class LineageParameters(FormParameters, PageParameters):
    """A page of the lineage of a model."""

    limit: int = Field(_ANCESTORS, ge=1, le=200)


@dataclass(frozen=True)
class TriedModel:
    """A model that a prompt is tried with."""

    id: str
    title: str


@router.get("/models")
def show_models(request: Request, service: ServiceDep, filters: Annotated[ModelTableParameters, Query()]) -> Response:
    """Show models, newest first."""
    page = list_models(service, filters)
    chosen = filters_of(filters)
    with service.uow.reading() as session:
        titles = jobs.labels(session, {model.job for model in page.data if model.job is not None})
    return render(
        request,
        "models.html",
        models=page.data,
        titles=titles,
        chosen=chosen,
        **page_links("/models", chosen, filters.cursor, page.next_cursor),
    )


@router.get("/models/{model}")
def show_model(
    model: str, request: Request, service: ServiceDep, page: Annotated[LineageParameters, Query()]
) -> Response:
    """Show a model with its ancestors down to the base model, and the seed, prompts and pairs of each."""
    detail = get_model(model, service)
    lineage = get_lineage(detail.id, service, page)
    with service.uow.reading() as session:
        set_ids = [ancestor.prompt_set for ancestor in lineage.data if ancestor.prompt_set is not None]
        sets = prompt_sets.names(session, set_ids)
        base = results.base_model(session, detail.base)
    installed = service.catalogue.models.get(detail.base)
    tried = [] if base is None or base.id == detail.id else [TriedModel(base.id, detail.base)]
    title = display_name(detail)
    path = f"/models/{model}"
    return render(
        request,
        "model.html",
        model=detail,
        title=title,
        scorers=sorted(service.catalogue.scorers),
        has_scorers=installed is not None and bool(installed.scorers or installed.reward),
        tried=[*tried, TriedModel(detail.id, title)],
        lineage=lineage.data,
        sets=sets,
        statistics=[(name, value) for name, value in detail.statistics.items() if isinstance(value, int | float)],
        **page_links(path, {}, page.cursor, lineage.next_cursor),
    )
