"""Conversion of prompt sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from api.converters.common import utc
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut, PromptWarning
from dfusion.prompts.text import prompt_warnings
from service.db.tables import PromptSet

_MAX_WARNINGS = 100


def prompt_set_out(row: PromptSet, size: int) -> PromptSetOut:
    return PromptSetOut(**_prompt_set_fields(row, size))


def prompt_set_detail(row: PromptSet) -> PromptSetDetail:
    fields = _prompt_set_fields(row, len(row.prompts))
    return PromptSetDetail(**fields, prompts=row.prompts, warnings=prompt_warnings_out(row.prompts))


def prompt_warnings_out(prompts: Iterable[Mapping[str, Any]]) -> list[PromptWarning]:
    """The first 100 warnings about stored prompts."""
    warnings = (
        PromptWarning(prompt=prompt["text"], message=message)
        for prompt in prompts
        for message in prompt_warnings(prompt["text"])
    )
    return list(islice(warnings, _MAX_WARNINGS))


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
