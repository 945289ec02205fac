"""Conversion of models, lineage, aliases and exports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.converters.common import utc
from api.wire.models import AdapterOut, AncestorOut, ExportOut, ModelDetail, ModelOut
from dfusion.recipes import Recipe
from service.db.queries.jobs import Origin
from service.db.tables import Artifact, Export, Model


def display_name(model: Model | ModelDetail) -> str:
    """The name of a base model, or the base model and the round of an adapter."""
    return model.name or f"{model.base}, round {model.round}"


def model_out(row: Model, adapter: Artifact | None, aliases: Sequence[str]) -> ModelOut:
    return ModelOut(**_model_fields(row, adapter, aliases))


def export_out(row: Export) -> ExportOut:
    return ExportOut(
        id=row.id,
        model=row.model_id,
        job=row.of_job_id,
        format=row.format,
        artifact=f"/artifacts/{row.artifact_id}",
        preview=None if row.preview_artifact_id is None else f"/artifacts/{row.preview_artifact_id}",
        recipe=None if row.recipe is None else Recipe.model_validate(row.recipe),
        statistics=row.statistics,
        created_at=utc(row.created_at),
    )


def model_detail(
    row: Model,
    adapter: Artifact | None,
    aliases: Sequence[str],
    lineage: Sequence[Model],
    exports: Sequence[Export],
) -> ModelDetail:
    return ModelDetail(
        **_model_fields(row, adapter, aliases),
        lineage=[model.id for model in lineage],
        exports=[export_out(export) for export in exports],
    )


def ancestor_out(row: Model, origin: Origin | None) -> AncestorOut:
    return AncestorOut(
        model=row.id,
        name=row.name,
        base=row.base,
        round=row.round,
        job=row.job_id,
        seed=origin.seed if origin else None,
        prompt_set=origin.prompt_set_id if origin else None,
        pairs=f"/pairs?job={row.job_id}&round={row.round}" if row.job_id else None,
        statistics=row.statistics,
    )


def _model_fields(row: Model, adapter: Artifact | None, aliases: Sequence[str]) -> dict[str, Any]:
    links = {"self": f"/models/{row.id}", "lineage": f"/models/{row.id}/lineage"}
    if row.job_id is not None:
        links["job"] = f"/jobs/{row.job_id}"
    if row.parent_id is not None:
        links["parent"] = f"/models/{row.parent_id}"

    file = None
    if adapter is not None:
        file = AdapterOut(artifact=f"/artifacts/{adapter.id}", sha256=adapter.sha256, size_bytes=adapter.size_bytes)

    return {
        "id": row.id,
        "name": row.name,
        "base": row.base,
        "parent": row.parent_id,
        "job": row.job_id,
        "round": row.round,
        "adapter": file,
        "aliases": list(aliases),
        "statistics": row.statistics,
        "created_at": utc(row.created_at),
        "links": links,
    }
