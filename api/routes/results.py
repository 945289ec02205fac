"""What jobs made: samples, pairs and models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from api.access import needs
from api.core.ids import IdKind, expect
from api.core.queries import results
from api.core.states import SampleRole
from api.deps import PageParameters, ServiceDep
from api.schemas import ListOut, ModelDetail, ModelOut, PairOut, SampleDetail, SampleOut

router = APIRouter(dependencies=[needs("read")])


class SampleFilters(PageParameters):
    """Which samples."""

    job: str | None = None
    role: SampleRole | None = None
    round: int | None = Field(None, ge=0, le=1_000_000)


class PairFilters(PageParameters):
    """Which pairs."""

    job: str | None = None
    round: int | None = Field(None, ge=0, le=1_000_000)
    adopted: bool | None = None


class ModelFilters(PageParameters):
    """Which models."""

    job: str | None = None


def _job_id(text: str | None) -> str | None:
    return None if text is None else expect(IdKind.JOB, text)


@router.get("/samples", tags=["samples"])
def list_samples(service: ServiceDep, filters: Annotated[SampleFilters, Query()]) -> ListOut[SampleOut]:
    """Samples, oldest first."""
    with service.uow.reading() as session:
        job_id = _job_id(filters.job)
        page = results.sample_page(session, filters.limit, filters.cursor, job_id, filters.role, filters.round)
        scores = results.scores(session, [row.id for row in page.rows])
        return ListOut[SampleOut].of(page, lambda row: SampleOut.of(row, scores[row.id]))


@router.get("/samples/{sample_id}", tags=["samples"])
def get_sample(sample_id: str, service: ServiceDep) -> SampleDetail:
    """A sample, with the pairs that it is in: base, reference and target side by side."""
    with service.uow.reading() as session:
        row = results.get_sample(session, sample_id)
        pairs = results.pairs_with(session, row.id)
        samples = results.samples(session, results.sides_of(pairs))
        return SampleDetail.detailed(row, results.scores(session, [row.id])[row.id], pairs, samples)


@router.get("/pairs", tags=["pairs"])
def list_pairs(service: ServiceDep, filters: Annotated[PairFilters, Query()]) -> ListOut[PairOut]:
    """Pairs, oldest first."""
    with service.uow.reading() as session:
        job_id = _job_id(filters.job)
        page = results.pair_page(session, filters.limit, filters.cursor, job_id, filters.round, filters.adopted)
        samples = results.samples(session, results.sides_of(page.rows))
        return ListOut[PairOut].of(page, lambda row: PairOut.of(row, samples))


@router.get("/pairs/{pair_id}", tags=["pairs"])
def get_pair(pair_id: str, service: ServiceDep) -> PairOut:
    """A pair."""
    with service.uow.reading() as session:
        row = results.get_pair(session, pair_id)
        return PairOut.of(row, results.samples(session, results.sides_of([row])))


@router.get("/models", tags=["models"])
def list_models(service: ServiceDep, filters: Annotated[ModelFilters, Query()]) -> ListOut[ModelOut]:
    """Models, newest first."""
    with service.uow.reading() as session:
        page = results.model_page(session, filters.limit, filters.cursor, _job_id(filters.job))
        files = results.artifacts(session, [row.adapter_artifact_id for row in page.rows if row.adapter_artifact_id])
        return ListOut[ModelOut].of(page, lambda row: ModelOut.of(row, files.get(row.adapter_artifact_id or "")))


@router.get("/models/{model_id}", tags=["models"])
def get_model(model_id: str, service: ServiceDep) -> ModelDetail:
    """A model, with its lineage."""
    with service.uow.reading() as session:
        row = results.get_model(session, model_id)
        adapter = results.get_artifact(session, row.adapter_artifact_id) if row.adapter_artifact_id else None
        return ModelDetail.detailed(row, adapter, results.lineage(session, row))
