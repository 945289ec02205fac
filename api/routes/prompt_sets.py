"""Prompt sets: the built-in lists are there from the start, others are added."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from api.access import needs
from api.body import media_type
from api.converters.common import list_of
from api.converters.prompt_sets import prompt_set_detail, prompt_set_out
from api.deps import PageParameters, Parameters, ServiceDep
from api.examples import PROMPT_SET_CSV, PROMPT_SET_LINES
from api.openapi import MADE_PROMPT_SET
from api.wire.common import ListOut
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut
from dfusion.prompts import Prompt
from service.db.queries import prompt_sets
from service.errors import NotFoundError
from service.ids import IdKind, expect
from service.prompt_files import Description, PromptSetSpec, SetName, from_csv, from_lines
from service.service import save_prompt_set

router = APIRouter(prefix="/prompt-sets", tags=["prompt sets"], dependencies=[needs("read")])
_TEXTS = {"text/plain": from_lines, "text/csv": from_csv}


class PromptSetParameters(Parameters):
    """What a body that is text, or the released code's list of prompts, does not say."""

    name: SetName | None = None
    description: Description | None = None


@dataclass(frozen=True)
class Sent:
    """A body and its media type."""

    media_type: str
    body: bytes


async def _sent(request: Request) -> Sent:
    return Sent(media_type(request), await request.body())


def _request_body() -> dict[str, Any]:
    """For OpenAPI: the three media types."""
    schema = PromptSetSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # /rounds and others have them among the components
    list_of_prompts = {"type": "array", "items": {"type": "string"}, "description": "The released code's prompt file"}
    text = {"type": "string"}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {"anyOf": [schema, list_of_prompts]}},
            "text/plain": {"schema": text, "example": PROMPT_SET_LINES},
            "text/csv": {"schema": text, "example": PROMPT_SET_CSV},
        },
    }


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    dependencies=[needs("submit")],
    responses={
        status.HTTP_201_CREATED: {"description": "A new set, or a new version of one", **MADE_PROMPT_SET},
        status.HTTP_200_OK: {
            "model": PromptSetDetail,
            "description": "It is there with the same prompts",
            **MADE_PROMPT_SET,
        },
    },
    openapi_extra={"requestBody": _request_body()},
)
def create_prompt_set(
    sent: Annotated[Sent, Depends(_sent)],
    parameters: Annotated[PromptSetParameters, Query()],
    service: ServiceDep,
    response: Response,
) -> PromptSetDetail:
    """Keep prompts under a name: a new version of it where they differ from its newest, else that one again.

    JSON has its name within, text and CSV in the query. Bad lines are named, as /lines/17, and nothing is kept then.
    Items are words of the prompt: given, marked as in "a [cat] eating a [sandwich]", or else found.
    """
    name, description, prompts = _read(sent, parameters)
    row, is_new = save_prompt_set(service, name, description, prompts)
    if not is_new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"/prompt-sets/{row.id}"
    return prompt_set_detail(row)


def _read(sent: Sent, parameters: PromptSetParameters) -> tuple[str, str, tuple[Prompt, ...]]:
    """Name, description and prompts. Raises RequestValidationError, InvalidRequestError."""
    if sent.media_type not in _TEXTS:
        spec = _read_json(sent.body, parameters.model_dump(exclude_none=True))
        return spec.name, spec.description, spec.read()
    if parameters.name is None:
        raise RequestValidationError([{"type": "missing", "loc": ("query", "name"), "msg": "Field required"}])
    prompts = _TEXTS[sent.media_type](sent.body.decode("utf-8-sig"))
    return parameters.name, parameters.description or "", prompts


def _read_json(body: bytes, named: dict[str, str]) -> PromptSetSpec:
    if not body:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
    try:
        return PromptSetSpec.of_json(json.loads(body), named)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error


@router.get("")
def list_prompt_sets(service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[PromptSetOut]:
    """Prompt sets that have a name, in their newest versions."""
    with service.uow.reading() as session:
        return list_of(ListOut[PromptSetOut], prompt_sets.page(session, page.limit, page.cursor), prompt_set_out)


@router.get("/{name_or_id}")
def get_prompt_set(name_or_id: str, service: ServiceDep) -> PromptSetDetail:
    """A prompt set by its name (newest version) or id, with its prompts."""
    with service.uow.reading() as session:
        row = prompt_sets.latest(session, name_or_id)
        if row is None:
            row = prompt_sets.by_id(session, expect(IdKind.PROMPT_SET, name_or_id))
        if row is None:
            raise NotFoundError(f"there is no prompt set {name_or_id}")
        return prompt_set_detail(row)
