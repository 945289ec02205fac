"""Conversion of prompt sets."""

from __future__ import annotations

from typing import Any

from api.converters.common import utc
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut
from service.db.tables import PromptSet


def prompt_set_out(row: PromptSet, size: int) -> PromptSetOut:
    return PromptSetOut(**_prompt_set_fields(row, size))


def prompt_set_detail(row: PromptSet) -> PromptSetDetail:
    return PromptSetDetail(**_prompt_set_fields(row, len(row.prompts)), prompts=row.prompts)


def _prompt_set_fields(row: PromptSet, size: int) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "version": row.version,
        "description": row.description,
        "builtin": row.builtin,
        "size": size,
        "created_at": utc(row.created_at),
        "links": {"self": f"/prompt-sets/{row.id}"},
    }
