"""Conversion of prompt sets."""

from __future__ import annotations

from typing import Any

from api.converters.common import utc
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut
from service.db.tables import PromptSet


def prompt_set_out(row: PromptSet) -> PromptSetOut:
    return PromptSetOut(**_prompt_set_fields(row))


def prompt_set_detail(row: PromptSet) -> PromptSetDetail:
    return PromptSetDetail(**_prompt_set_fields(row), prompts=row.prompts)


def _prompt_set_fields(row: PromptSet) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "version": row.version,
        "description": row.description,
        "builtin": row.builtin,
        "size": len(row.prompts),
        "created_at": utc(row.created_at),
        "links": {"self": f"/prompt-sets/{row.id}"},
    }
