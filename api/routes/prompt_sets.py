"""Routes for prompt sets: built-in sets and sets that clients create."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from api.access import require_scope
from api.body import media_type
from api.converters.common import convert_page
from api.converters.prompt_sets import prompt_set_detail, prompt_set_out
from api.deps import PageParameters, Parameters, ServiceDep
from api.examples import PROMPT_SET_CSV, PROMPT_SET_LINES
from api.openapi import CREATED_PROMPT_SET
from api.wire.common import ListOut
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut
from dfusion.prompts import Prompt
from service.db.queries import prompt_sets
from service.errors import NotFoundError
from service.prompt_files import Description, PromptSetSpec, SetName, from_csv, from_lines
from service.service import delete_prompt_set, save_prompt_set

router = APIRouter(prefix="/prompt-sets", tags=["prompt sets"], dependencies=[require_scope("read")])
_TEXT_PARSERS = {"text/plain": from_lines, "text/csv": from_csv}


class PromptSetParameters(Parameters):
    """Name and description of a set whose body is text or the released code's list of prompts."""

    name: SetName | None = None
    description: Description | None = None


@dataclass(frozen=True)
class RawBody:
    """A request body and its media type."""

    media_type: str
    body: bytes


async def _raw_body(request: Request) -> RawBody:
    return RawBody(media_type(request), await request.body())


def _request_body() -> dict[str, Any]:
    """Describe the three media types of the body for OpenAPI."""
    schema = PromptSetSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # other operations already add these components
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
    dependencies=[require_scope("submit")],
    responses={
        status.HTTP_201_CREATED: {"description": "A new set or a new version", **CREATED_PROMPT_SET},
        status.HTTP_200_OK: {
            "model": PromptSetDetail,
            "description": "The newest version already has these prompts",
            **CREATED_PROMPT_SET,
        },
    },
    openapi_extra={"requestBody": _request_body()},
)
def create_prompt_set(
    raw: Annotated[RawBody, Depends(_raw_body)],
    parameters: Annotated[PromptSetParameters, Query()],
    service: ServiceDep,
    response: Response,
) -> PromptSetDetail:
    """Create a prompt set, or a new version of it if the prompts differ from its newest version.

    JSON contains the name; text and CSV take it from the query. Errors name the invalid lines, such as /lines/17, and
    nothing is stored. Items are words of the prompt. They are listed, marked as in "a [cat] eating a [sandwich]", or
    detected by the service.
    """
    name, description, prompts = _read(raw, parameters)
    row, is_new = save_prompt_set(service, name, description, prompts)
    if not is_new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"/prompt-sets/{row.id}"
    return prompt_set_detail(row)


def _read(raw: RawBody, parameters: PromptSetParameters) -> tuple[str, str, tuple[Prompt, ...]]:
    """Parse name, description and prompts. Raises RequestValidationError, InvalidRequestError."""
    if raw.media_type not in _TEXT_PARSERS:
        spec = _read_json(raw.body, parameters.model_dump(exclude_none=True))
        return spec.name, spec.description, spec.read()

    if parameters.name is None:
        raise RequestValidationError([{"type": "missing", "loc": ("query", "name"), "msg": "Field required"}])
    prompts = _TEXT_PARSERS[raw.media_type](raw.body.decode("utf-8-sig"))
    return parameters.name, parameters.description or "", prompts


def _read_json(body: bytes, parameters: dict[str, str]) -> PromptSetSpec:
    if not body:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
    try:
        parsed = json.loads(body)
        return PromptSetSpec.of_json(parsed, parameters)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        located = [{**entry, "loc": ("body", *entry["loc"])} for entry in problems]
        raise RequestValidationError(located, body=parsed if isinstance(parsed, dict) else None) from error


@router.get("")
def list_prompt_sets(service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[PromptSetOut]:
    """List the newest versions of the named prompt sets."""
    with service.uow.reading() as session:
        rows = prompt_sets.page(session, page.limit, page.cursor)
        sizes = prompt_sets.sizes(session, [row.id for row in rows.rows])
        return convert_page(ListOut[PromptSetOut], rows, lambda row: prompt_set_out(row, sizes[row.id]))


@router.get("/{name_or_id}")
def get_prompt_set(name_or_id: str, service: ServiceDep) -> PromptSetDetail:
    """Return a prompt set with its prompts, by name (newest version) or id."""
    with service.uow.reading() as session:
        row = prompt_sets.latest(session, name_or_id)
        if row is None:
            row = prompt_sets.by_id(session, name_or_id)
        if row is None:
            raise NotFoundError(f"there is no prompt set {name_or_id!r}; expected the name or id of a prompt set")
        return prompt_set_detail(row)


@router.delete(
    "/{name_or_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    dependencies=[require_scope("submit")],
    operation_id="delete_prompt_set",
)
def delete(name_or_id: str, service: ServiceDep) -> None:
    """Delete all versions of a prompt set by its name, or one version by its id.

    409 if a job uses one of them; the error lists the first of these jobs. Built-in lists cannot be deleted. Prompts
    that came with the request of a job are deleted with the job.
    """
    delete_prompt_set(service, name_or_id)
