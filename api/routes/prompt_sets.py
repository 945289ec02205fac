"""Prompt sets: the built-in lists are there from the start."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.access import needs
from api.core.errors import NotFoundError
from api.core.ids import IdKind, expect
from api.core.queries import prompt_sets
from api.deps import PageParameters, ServiceDep
from api.schemas import ListOut, PromptSetDetail, PromptSetOut

router = APIRouter(prefix="/prompt-sets", tags=["prompt sets"], dependencies=[needs("read")])


@router.get("")
def list_prompt_sets(service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[PromptSetOut]:
    """Prompt sets that have a name, in their newest versions."""
    with service.uow.reading() as session:
        return ListOut[PromptSetOut].of(prompt_sets.page(session, page.limit, page.cursor), PromptSetOut.of)


@router.get("/{name_or_id}")
def get_prompt_set(name_or_id: str, service: ServiceDep) -> PromptSetDetail:
    """A prompt set by its name (newest version) or id, with its prompts."""
    with service.uow.reading() as session:
        row = prompt_sets.latest(session, name_or_id)
        if row is None:
            row = prompt_sets.by_id(session, expect(IdKind.PROMPT_SET, name_or_id))
        if row is None:
            raise NotFoundError(f"there is no prompt set {name_or_id}")
        return PromptSetDetail.detailed(row)
