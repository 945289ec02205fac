"""What FastAPI cannot find in the routes, for the OpenAPI document: problems, headers and links of answers."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from api.errors import MEDIA_TYPE
from api.examples import ANSWERS, REQUESTS
from api.wire.common import Problem
from api.wire.estimates import EstimateOut
from api.wire.jobs import JobDetail

Responses = dict[int | str, dict[str, Any]]

_REFERENCE = "#/components/schemas/{model}"
_PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(model=Problem.__name__)}}}}
PROBLEMS: Responses = {
    "4XX": {"description": "What is wrong with the request", **_PROBLEM},
    "5XX": {"description": "Why the service cannot answer just now", **_PROBLEM},
}


def header(description: str, required: bool = True) -> dict[str, Any]:
    """A header of an answer."""
    return {"description": description, "required": required, "schema": {"type": "string"}}


def _links(parameter: str, *operations: str) -> dict[str, Any]:
    """Operations that take the answer's `id` as their path's parameter."""
    found = {"parameters": {parameter: "$response.body#/id"}}
    return {operation: {"operationId": operation, **found} for operation in operations}


RETRY_AFTER = header("Seconds to wait before the job is looked at again", required=False)
ETAG = header("The pair's revision, for If-Match")
_OF_JOB = ("get_job", "cancel_job", "pause_job", "resume_job", "list_events", "get_logs", "get_job_metrics")
MADE_JOB: dict[str, Any] = {
    "model": JobDetail,
    "description": "The new job",
    "headers": {"Location": header("The job"), "Retry-After": header("Seconds to wait before it is looked at")},
    "links": _links("job_id", *_OF_JOB),
}
SUBMISSION: Responses = {
    HTTPStatus.ACCEPTED.value: MADE_JOB,
    HTTPStatus.OK.value: {"model": EstimateOut, "description": "With `dry_run`: what the job would take"},
}
MADE_PROMPT_SET: dict[str, Any] = {
    "headers": {"Location": header("The prompt set")},
    "links": _links("name_or_id", "get_prompt_set"),
}
MADE_KEY: dict[str, Any] = {"links": _links("key_id", "revoke_key")}
REDIRECT: dict[str, Any] = {"headers": {"Location": header("Where the bytes are")}}
_BYTES: Mapping[str, Any] = MappingProxyType({"*/*": {}})
_OF_BYTES = {
    "ETag": header("The SHA-256 of all bytes"),
    "Accept-Ranges": header("bytes"),
    "Cache-Control": header("The bytes never change"),
}
ARTIFACT: Responses = {
    200: {"description": "All bytes", "headers": _OF_BYTES, "content": dict(_BYTES)},
    206: {
        "description": "The part that `Range` asks for",
        "headers": {**_OF_BYTES, "Content-Range": header("Which part, and of how many bytes")},
        "content": dict(_BYTES),
    },
    304: {"description": "The client has them: `If-None-Match` names their ETag", "headers": _OF_BYTES},
    307: {"description": "The storage hands them out itself", **REDIRECT},
}
ARTIFACT_HEAD: Responses = {200: {"description": "What GET would say", "headers": _OF_BYTES}}


def complete(document: dict[str, Any]) -> None:
    """Add to FastAPI's document the components that only these parts of it name, and the examples."""
    problem = Problem.model_json_schema(ref_template=_REFERENCE)
    schemas = document["components"]["schemas"]
    schemas |= {**problem.pop("$defs"), Problem.__name__: problem}
    for name, answer in ANSWERS.items():
        schemas[name]["examples"] = [answer]
        if (page := schemas.get(f"ListOut_{name}_")) is not None:
            page["examples"] = [{"data": [answer], "has_more": False, "next_cursor": None}]
    for path in document["paths"].values():
        for operation in path.values():
            if (requests := REQUESTS.get(operation["operationId"])) is not None:
                operation["requestBody"]["content"]["application/json"]["examples"] = requests
