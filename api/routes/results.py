"""Routes for the outputs of jobs: samples, pairs, models and exports."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response, status
from fastapi.responses import RedirectResponse
from pydantic import Field
from sqlalchemy import ColumnElement
from sqlalchemy.orm import Session

from api.access import require_scope
from api.converters.common import convert_page
from api.converters.models import ancestor_out, export_out, model_detail, model_out
from api.converters.pairs import pair_out
from api.converters.samples import sample_detail, sample_out
from api.deps import CallerDep, PageParameters, Parameters, PromptSetFilter, ResultParameters, ServiceDep
from api.openapi import ETAG, REDIRECT
from api.wire.common import ListOut, PersonName
from api.wire.models import AliasIn, AncestorOut, ExportOut, ModelDetail, ModelOut
from api.wire.pairs import PairOut, VerdictIn
from api.wire.samples import SampleDetail, SampleOut
from dfusion.recipes import ExportFormat
from service.db.queries import jobs, previews, prompt_sets, results, verdicts
from service.db.queries.pages import unindexed
from service.db.tables import Model, Pair
from service.errors import ConflictError, ForbiddenError, InvalidRequestError, NotFoundError
from service.ids import IdKind, expect
from service.keys import Caller
from service.service import Service, give_verdict, set_alias
from service.states import KeyScope, SampleRole

_LINEAGE = 200
"""Models of the lineage that a model shows; `/models/{model}/lineage` has pages of all."""
_EXPORTS = 200
"""Exports that a model shows; `/exports?model=…` has pages of all."""

router = APIRouter(dependencies=[require_scope("read")])


class SampleListParameters(ResultParameters):
    """Filters of the list of samples. `role` and `prompt` can be repeated."""

    job: str | None = None
    role: list[SampleRole] = Field([], max_length=len(SampleRole))
    round: int | None = Field(None, ge=0, le=1_000_000)
    prompt_set: PromptSetFilter = None


class PairListParameters(ResultParameters):
    """Filters of the list of pairs. `prompt` can be repeated."""

    job: str | None = None
    round: int | None = Field(None, ge=0, le=1_000_000)
    adopted: bool | None = None
    judged: bool | None = Field(None, description="Whether the pair has a verdict")
    judged_by_me: bool | None = Field(None, description="Whether the pair has a verdict of the reviewer")
    reviewer: PersonName | None = Field(None, description="The reviewer; with API keys, the name of the key")
    reviewers_below: int | None = Field(
        None, ge=1, le=verdicts.MAX_REVIEWERS, description="Only pairs that fewer than this many reviewers have judged"
    )
    in_review: bool | None = Field(
        None, description="Whether a review of its round waits for the pair: all pairs, or those of the sample"
    )
    gold: bool | None = Field(None, description="Whether the pair is a gold pair; needs the scope admin")
    prompt_set: PromptSetFilter = None


class ModelListParameters(PageParameters):
    """Filters of the list of models."""

    job: str | None = None


def _job_id(text: str | None) -> str | None:
    return None if text is None else expect(IdKind.JOB, text)


def _set_id(session: Session, text: str | None) -> str | None:
    return None if text is None else prompt_sets.id_of(session, text)


@router.get("/samples", tags=["samples"])
def list_samples(service: ServiceDep, filters: Annotated[SampleListParameters, Query()]) -> ListOut[SampleOut]:
    """List samples, oldest first.

    A page reads a limited number of rows. If few of them match the filters, it is shorter than `limit`, even empty:
    follow `next_cursor` until `has_more` is false.
    """
    with service.uow.reading() as session:
        job_id = _job_id(filters.job)
        set_id = _set_id(session, filters.prompt_set)
        page = results.sample_page(
            session,
            filters.limit,
            filters.cursor,
            job_id,
            filters.role,
            filters.round,
            set_id,
            created=filters.created,
            prompt=filters.prompts,
            score=filters.score,
        )
        scores = results.scores(session, [row.id for row in page.rows])
        return convert_page(ListOut[SampleOut], page, lambda row: sample_out(row, scores[row.id]))


@router.get("/samples/{sample_id}", tags=["samples"])
def get_sample(sample_id: str, service: ServiceDep) -> SampleDetail:
    """Return a sample with its previews and the pairs that contain it. `POST /previews` makes previews."""
    with service.uow.reading() as session:
        row = results.get_sample(session, sample_id)
        pairs = results.pairs_with(session, row.id)
        samples = results.samples(session, results.sides_of(pairs))
        given = verdicts.of_pairs(session, [pair.id for pair in pairs])
        preview = next(iter(previews.of_samples(session, [row.id])[row.id]), None)
        return sample_detail(row, results.scores(session, [row.id])[row.id], pairs, samples, given, preview)


@router.get("/pairs", tags=["pairs"])
def list_pairs(
    service: ServiceDep, caller: CallerDep, filters: Annotated[PairListParameters, Query()]
) -> ListOut[PairOut]:
    """List pairs, oldest first.

    A page reads a limited number of rows. If few of them match the filters, it is shorter than `limit`, even empty:
    follow `next_cursor` until `has_more` is false.
    """
    with service.uow.reading() as session:
        page = results.pair_page(
            session,
            filters.limit,
            filters.cursor,
            _job_id(filters.job),
            filters.round,
            filters.adopted,
            judged=filters.judged,
            prompt_set_id=_set_id(session, filters.prompt_set),
            created=filters.created,
            prompt=filters.prompts,
            score=filters.score,
            where=_review_filters(filters, caller),
        )
        samples = results.samples(session, results.sides_of(page.rows))
        given = verdicts.of_pairs(session, [row.id for row in page.rows])
        return convert_page(ListOut[PairOut], page, lambda row: pair_out(row, samples, given))


def _review_filters(filters: PairListParameters, caller: Caller) -> list[ColumnElement[bool]]:
    """The filters by reviewers and of gold pairs as conditions. Raises ForbiddenError if the caller may not use one."""
    if filters.gold is not None and KeyScope.ADMIN not in caller.scopes:
        raise ForbiddenError(KeyScope.ADMIN)

    reviewer = reviewer_name(filters.reviewer, caller)
    where: list[ColumnElement[bool]] = []
    if filters.judged_by_me is not None:
        own = verdicts.is_judged_by(reviewer)
        where.append(own if filters.judged_by_me else ~own)
    if filters.reviewers_below is not None:
        where.append(unindexed(Pair.reviewers) < filters.reviewers_below)
    if filters.in_review is not None:
        where.append(Pair.review_exempt.is_(not filters.in_review))
    if filters.gold is not None:
        where.append(Pair.gold.is_not(None) if filters.gold else Pair.gold.is_(None))
    return where


@router.get("/pairs/{pair_id}", tags=["pairs"], responses={status.HTTP_200_OK: {"headers": {"ETag": ETAG}}})
def get_pair(pair_id: str, service: ServiceDep, response: Response) -> PairOut:
    """Return a pair. The ETag is its revision."""
    pair = _read_pair(service, pair_id)
    response.headers["ETag"] = f'"{pair.revision}"'
    return pair


def _read_pair(service: Service, pair_id: str) -> PairOut:
    with service.uow.reading() as session:
        row = results.get_pair(session, pair_id)
        return pair_out(row, results.samples(session, results.sides_of([row])), verdicts.of_pairs(session, [row.id]))


@router.put(
    "/pairs/{pair_id}/verdict",
    tags=["pairs"],
    dependencies=[require_scope("review")],
    responses={status.HTTP_200_OK: {"headers": {"ETag": ETAG}}},
)
def put_verdict(
    pair_id: str,
    verdict: VerdictIn,
    service: ServiceDep,
    caller: CallerDep,
    response: Response,
    if_match: Annotated[str | None, Header(max_length=30)] = None,
) -> PairOut:
    """Set your verdict: which side of a pair is better, that they tie, or that neither is good.

    Verdicts of other reviewers do not change. `If-Match` with the pair's ETag prevents overwriting a later verdict of
    your own, for example from another browser (412). A job that waits for review continues after its last verdict.
    Where API keys are required, the reviewer is the name of the key.
    """
    revision = None if if_match is None or if_match.strip() == "*" else _parse_revision(if_match)
    give_verdict(service, pair_id, verdict.prefer, reviewer_name(verdict.reviewer, caller), revision)
    return get_pair(pair_id, service, response)


def reviewer_name(given: str | None, caller: Caller) -> str | None:
    """The name of the API key, or without keys the name in the request. Raises InvalidRequestError for another one."""
    if caller.name is None:
        return given
    if given not in (None, caller.name):
        raise InvalidRequestError.at("/reviewer", f"expected no name or {caller.name!r}, the name of the API key")
    return caller.name


def _parse_revision(if_match: str) -> int:
    match = re.fullmatch(r'(?:W/)?"?(\d{1,18})"?', if_match.strip())
    if match is None:
        raise InvalidRequestError.at("/if-match", f"expected a pair's ETag, got {if_match!r}", "invalid_parameter")
    return int(match[1])


@router.get("/models", tags=["models"])
def list_models(service: ServiceDep, filters: Annotated[ModelListParameters, Query()]) -> ListOut[ModelOut]:
    """List models, newest first."""
    with service.uow.reading() as session:
        page = results.model_page(session, filters.limit, filters.cursor, _job_id(filters.job))
        files = results.artifacts(session, [row.adapter_artifact_id for row in page.rows if row.adapter_artifact_id])
        aliases = results.aliases(session, [row.id for row in page.rows])

        def convert(row: Model) -> ModelOut:
            return model_out(row, files.get(row.adapter_artifact_id or ""), aliases[row.id])

        return convert_page(ListOut[ModelOut], page, convert)


@router.get("/models/{model}", tags=["models"])
def get_model(model: str, service: ServiceDep) -> ModelDetail:
    """Return a model with its lineage and its newest exports, by id, name or alias."""
    with service.uow.reading() as session:
        row = _model(session, model)
        adapter = results.get_artifact(session, row.adapter_artifact_id) if row.adapter_artifact_id else None
        aliases = results.aliases(session, [row.id])[row.id]
        lineage = results.lineage(session, row.id, _LINEAGE).rows
        exports = results.export_page(session, _EXPORTS, None, model_id=row.id).rows
        return model_detail(row, adapter, aliases, lineage, exports)


def _model(session: Session, name: str) -> Model:
    """The model with this id, name or alias. Raises NotFoundError."""
    row = results.find_model(session, name)
    if row is None:
        raise NotFoundError(f"there is no model {name!r}; expected the id, name or alias of a model")
    return row


@router.get("/models/{model}/lineage", tags=["models"])
def get_lineage(model: str, service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[AncestorOut]:
    """List a model and its ancestors down to the base model, with job, round, seed, prompts and pairs of each."""
    with service.uow.reading() as session:
        rows = results.lineage(session, _model(session, model).id, page.limit, page.cursor)
        origins = jobs.origins(session, {row.job_id for row in rows.rows if row.job_id is not None})
        return convert_page(ListOut[AncestorOut], rows, lambda row: ancestor_out(row, origins.get(row.job_id or "")))


class DownloadParameters(Parameters):
    """The format of a download."""

    format: ExportFormat = "diffusers"


@router.get(
    "/models/{model}/download",
    tags=["models"],
    status_code=status.HTTP_307_TEMPORARY_REDIRECT,
    response_class=RedirectResponse,
    responses={status.HTTP_307_TEMPORARY_REDIRECT: REDIRECT},
)
def download_model(
    model: str, service: ServiceDep, parameters: Annotated[DownloadParameters, Query()]
) -> RedirectResponse:
    """Redirect to the adapter's file. Formats other than `diffusers` must be exported first (409)."""
    with service.uow.reading() as session:
        row = _model(session, model)
        if row.adapter_artifact_id is None:
            raise NotFoundError(f"{row.id} is a base model: it has no adapter")

        artifact: str | None = None
        if parameters.format == "diffusers":
            artifact = row.adapter_artifact_id
        else:
            export = results.newest_export(session, row.id, parameters.format)
            artifact = export.artifact_id if export else None
        if artifact is None:
            body = f'{{"model": "{row.id}", "format": "{parameters.format}"}}'
            raise ConflictError(f"{row.id} has no export as {parameters.format} yet: POST /exports {body}")
        return RedirectResponse(f"/artifacts/{artifact}", status.HTTP_307_TEMPORARY_REDIRECT)


ALIAS = r"^[a-z][a-z0-9-]{0,63}$"
Alias = Annotated[str, Path(pattern=ALIAS)]


@router.put("/aliases/{name}", tags=["models"], dependencies=[require_scope("submit")])
def put_alias(name: Alias, alias: AliasIn, service: ServiceDep) -> ModelDetail:
    """Set an alias of a model, such as "champion". An existing alias moves to this model."""
    set_alias(service, name, alias.model)
    return get_model(alias.model, service)


@router.delete(
    "/aliases/{name}", tags=["models"], status_code=status.HTTP_204_NO_CONTENT, dependencies=[require_scope("submit")]
)
def delete_alias(name: Alias, service: ServiceDep) -> None:
    """Remove an alias."""
    with service.uow.writing() as session:
        if not results.remove_alias(session, name):
            raise NotFoundError(f"there is no alias {name!r}")


class ExportListParameters(PageParameters):
    """Filters of the list of exports: those of a job's pairs, those of a model."""

    job: str | None = None
    model: str | None = Field(None, max_length=100, description="Id, name or alias of a model")


@router.get("/exports", tags=["models"])
def list_exports(service: ServiceDep, filters: Annotated[ExportListParameters, Query()]) -> ListOut[ExportOut]:
    """List exports of models and of the pairs of jobs, newest first."""
    with service.uow.reading() as session:
        job_id = _job_id(filters.job)
        model_id = None if filters.model is None else _model(session, filters.model).id
        page = results.export_page(session, filters.limit, filters.cursor, model_id, job_id)
        return convert_page(ListOut[ExportOut], page, export_out)
