"""Models, their lineage, aliases and exports."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from api.wire.common import Links
from dfusion.recipes import Recipe


class AdapterOut(BaseModel):
    """A trained adapter's file."""

    artifact: str
    sha256: str
    size_bytes: int


class ModelOut(BaseModel):
    """A base model (`name` is set) or an adapter on one, with the statistics of its training."""

    id: str
    name: str | None
    base: str
    parent: str | None
    job: str | None
    round: int | None
    adapter: AdapterOut | None
    aliases: list[str]
    statistics: dict[str, Any]
    created_at: datetime
    links: Links


class ExportOut(BaseModel):
    """A model's adapter or a job's pairs in a format for other programs, with the results of its verification."""

    id: str
    model: str | None
    job: str | None
    format: str
    artifact: str
    preview: str | None = Field(description="An image by the model; null for pairs and older exports")
    recipe: Recipe | None = Field(description="How stock diffusers renders the preview again")
    statistics: dict[str, Any]
    created_at: datetime


class ModelDetail(ModelOut):
    """A model with its lineage (the model, its parent and so on) and its newest exports, at most 200 of each."""

    lineage: list[str]
    exports: list[ExportOut]


class AncestorOut(BaseModel):
    """A model of a lineage, with the job, seed and prompts of its training."""

    model: str
    name: str | None
    base: str
    round: int | None
    job: str | None
    seed: int | None
    prompt_set: str | None
    pairs: str | None
    statistics: dict[str, Any]


class AliasIn(BaseModel):
    """The model that an alias refers to: its id, name or another alias."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=100)
