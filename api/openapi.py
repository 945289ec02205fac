"""Parts of the OpenAPI document that FastAPI cannot derive: problems, response headers, links and examples."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from api.errors import MEDIA_TYPE
from api.examples import REQUESTS, RESPONSES
from api.wire.common import Problem
from api.wire.estimates import EstimateOut
from api.wire.jobs import JobDetail

Responses = dict[int | str, dict[str, Any]]

_REFERENCE = "#/components/schemas/{model}"
_PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(model=Problem.__name__)}}}}
PROBLEMS: Responses = {
    "4XX": {"description": "The request is invalid or not permitted", **_PROBLEM},
    "5XX": {"description": "The service cannot handle the request", **_PROBLEM},
}


def header(description: str, required: bool = True) -> dict[str, Any]:
    """Describe a response header."""
    return {"description": description, "required": required, "schema": {"type": "string"}}


def _links(parameter: str, *operations: str) -> dict[str, Any]:
    """Link operations whose path parameter is the response's `id`."""
    parameters = {parameter: "$response.body#/id"}
    return {operation: {"operationId": operation, "parameters": parameters} for operation in operations}


RETRY_AFTER = header("Seconds to wait before reading the job again", required=False)
ETAG = header("The pair's revision, for If-Match")
_JOB_OPERATIONS = (
    "get_job",
    "cancel_job",
    "pause_job",
    "resume_job",
    "skip_review",
    "list_events",
    "get_logs",
    "get_job_metrics",
)
CREATED_JOB: dict[str, Any] = {
    "model": JobDetail,
    "description": "The new job",
    "headers": {"Location": header("Path of the job"), "Retry-After": header("Seconds to wait before reading the job")},
    "links": _links("job_id", *_JOB_OPERATIONS),
}
SUBMISSION: Responses = {
    HTTPStatus.ACCEPTED.value: CREATED_JOB,
    HTTPStatus.OK.value: {"model": EstimateOut, "description": "With `dry_run`: the estimated cost of the job"},
}
CREATED_PROMPT_SET: dict[str, Any] = {
    "headers": {"Location": header("Path of the prompt set")},
    "links": _links("name_or_id", "get_prompt_set"),
}
CREATED_PREFERENCE_TEST: dict[str, Any] = {
    "headers": {"Location": header("Path of the preference test")},
    "links": _links("test_id", "get_preference_test", "next_preference_question", "get_preference_results"),
}
CREATED_KEY: dict[str, Any] = {"links": _links("key_id", "revoke_key")}
CREATED_WEBHOOK: dict[str, Any] = {"links": _links("webhook_id", "remove_webhook")}
REDIRECT: dict[str, Any] = {"headers": {"Location": header("Address of the bytes")}}
_BYTES: Mapping[str, Any] = MappingProxyType({"*/*": {}})
_BYTES_HEADERS = {
    "ETag": header("The SHA-256 of all bytes"),
    "Accept-Ranges": header("Always `bytes`"),
    "Cache-Control": header("The bytes are immutable"),
}
ARTIFACT: Responses = {
    200: {"description": "All bytes", "headers": _BYTES_HEADERS, "content": dict(_BYTES)},
    206: {
        "description": "The part that `Range` requests",
        "headers": {**_BYTES_HEADERS, "Content-Range": header("The part and the total number of bytes")},
        "content": dict(_BYTES),
    },
    304: {"description": "Not modified: `If-None-Match` contains the ETag", "headers": _BYTES_HEADERS},
    307: {"description": "The storage serves the bytes", **REDIRECT},
}
ARTIFACT_HEAD: Responses = {200: {"description": "The headers of GET", "headers": _BYTES_HEADERS}}


def complete(document: dict[str, Any]) -> None:
    """Add the components that only this module refers to, and the examples, to FastAPI's document."""
    problem = Problem.model_json_schema(ref_template=_REFERENCE)
    schemas = document["components"]["schemas"]
    schemas |= {**problem.pop("$defs"), Problem.__name__: problem}

    for name, response in RESPONSES.items():
        schemas[name]["examples"] = [response]
        if (page := schemas.get(f"ListOut_{name}_")) is not None:
            page["examples"] = [{"data": [response], "has_more": False, "next_cursor": None}]

    for path in document["paths"].values():
        for operation in path.values():
            if (requests := REQUESTS.get(operation["operationId"])) is not None:
                operation["requestBody"]["content"]["application/json"]["examples"] = requests
