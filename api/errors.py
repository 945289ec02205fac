"""Converts errors to problem details (RFC 9457). The only module that maps errors to HTTP status codes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from dfusion.errors import FieldsError
from service.db.unit_of_work import is_transient
from service.errors import (
    MAX_PROBLEMS,
    ConflictError,
    FieldProblem,
    ForbiddenError,
    IdempotencyError,
    InUseError,
    InvalidRequestError,
    LowDiskError,
    NotFoundError,
    OutcomeUnknownError,
    OverloadError,
    PreconditionError,
    ServiceError,
    StorageError,
    json_pointer,
)

MEDIA_TYPE = "application/problem+json"
_STATUS: tuple[tuple[type[ServiceError], HTTPStatus], ...] = (
    (InvalidRequestError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (IdempotencyError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (NotFoundError, HTTPStatus.NOT_FOUND),
    (ConflictError, HTTPStatus.CONFLICT),
    (PreconditionError, HTTPStatus.PRECONDITION_FAILED),
    (StorageError, HTTPStatus.SERVICE_UNAVAILABLE),
    (OutcomeUnknownError, HTTPStatus.SERVICE_UNAVAILABLE),
    (ForbiddenError, HTTPStatus.FORBIDDEN),
    (LowDiskError, HTTPStatus.SERVICE_UNAVAILABLE),
    (OverloadError, HTTPStatus.TOO_MANY_REQUESTS),
)
_RETRY_AFTER_SECONDS = 5
_logger = logging.getLogger(__name__)


def problem(
    status: int,
    code: str,
    detail: str,
    errors: Iterable[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Create a problem response.

    Args:
        status: HTTP status code.
        code: Machine-readable error code.
        detail: Message for people.
        errors: Pointer and message of each wrong field.
        headers: Additional response headers.

    Returns:
        The response, as application/problem+json.
    """
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": int(status),
        "code": code,
        "detail": detail,
        "errors": list(errors),
    }
    return JSONResponse(content, int(status), dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Register the handlers that convert every error of `app` to a problem response."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (DBAPIError, PoolTimeoutError):
        app.add_exception_handler(kind, _database_error)
    app.add_exception_handler(Exception, _unexpected)


def _service_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ServiceError):
        raise error
    status = status_of(error)
    fields: list[dict[str, str]] = []
    if isinstance(error, (InvalidRequestError, InUseError)):
        fields = [{"pointer": p.pointer, "message": p.message} for p in error.problems]
    if isinstance(error, InvalidRequestError) and not fields:
        fields = _whole_request(str(error))
    elif isinstance(error, IdempotencyError):
        fields = [{"pointer": "/idempotency-key", "message": str(error)}]
    return problem(status, error.code, str(error), fields, _headers(error, status))


def status_of(error: ServiceError) -> HTTPStatus:
    """The HTTP status of an error of the service."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)


def _whole_request(message: str) -> list[dict[str, str]]:
    """The problem of a request as a whole."""
    return [{"pointer": "", "message": message}]


def _headers(error: ServiceError, status: HTTPStatus) -> dict[str, str]:
    if isinstance(error, ForbiddenError):
        return {"WWW-Authenticate": f'Bearer realm="dfusion", error="insufficient_scope", scope="{error.scope}"'}
    if isinstance(error, OverloadError):
        return {"Retry-After": str(error.retry_after_seconds)}
    return {"Retry-After": str(_RETRY_AFTER_SECONDS)} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}


def _database_error(request: Request, error: Exception) -> Response:
    if isinstance(error, DataError):  # values that validation accepts, such as text with a NUL
        detail = "the request contains a value that the database cannot store"
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", detail, _whole_request(detail))
    if not is_transient(error):
        return _unexpected(request, error)
    _logger.warning("database unavailable: %s", type(error).__name__)
    headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
    detail = "the database is unavailable; try again"
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "database_unavailable", detail, headers=headers)


def _validation_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    problems = _without_consequences(error.errors())[:MAX_PROBLEMS]
    fields = [{"pointer": p.pointer, "message": p.message} for p in _field_problems(problems, error.body)]
    locations = {str(e["loc"][0]) for e in problems}
    code = "invalid_request" if locations == {"body"} else "invalid_parameter"
    if any(map(_is_empty_prompt_set, problems)):
        code = "empty_prompt_set"

    detail = "; ".join(f"{f['pointer'] or '/'}: {f['message']}" for f in fields[:5])
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, code, detail, fields)


def field_problems(error: ValidationError, body: Any) -> list[FieldProblem]:
    """The problems of a body that its model refuses, as a response lists them."""
    located = [{**e, "loc": ("body", *e["loc"])} for e in error.errors()]
    return list(_field_problems(_without_consequences(located)[:MAX_PROBLEMS], body))


def _field_problems(problems: Iterable[Mapping[str, Any]], body: Any) -> Iterator[FieldProblem]:
    for e in problems:
        for pointer in _pointers(e, body):
            yield FieldProblem(pointer, _message(e))


def _pointers(error: Mapping[str, Any], body: Any) -> list[str]:
    """The fields with this error: that of its location, or those of the location that do not fit together."""
    location = tuple(error["loc"][1:])
    if error["loc"][0] == "body" and body is not None:
        location = _location_in(body, location, error["type"] == "missing")
    cause = error.get("ctx", {}).get("error")
    names = cause.fields if isinstance(cause, FieldsError) else ()
    return [json_pointer((*location, name)) for name in names] or [json_pointer(location)]


def _location_in(body: Any, location: tuple[Any, ...], is_missing: bool) -> tuple[Any, ...]:
    """The location without the names that pydantic gives to the alternatives of a union, which no body contains."""
    parts: list[Any] = []
    value = body
    for n, part in enumerate(location):
        is_name = isinstance(value, Mapping) and part in value
        is_index = isinstance(value, Sequence) and isinstance(part, int) and part < len(value)
        if is_name or is_index:
            value = value[part]
            parts.append(part)
        elif is_missing and n == len(location) - 1:
            parts.append(part)
    return tuple(parts)


def _without_consequences(problems: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Drop "too short" for a list that is too short only because its items are wrong."""
    if not any(e["type"] == "too_short" for e in problems):  # there may be a hundred thousand problems
        return problems

    parents: set[tuple[Any, ...]] = set()
    for e in problems:
        location = tuple(e["loc"])
        parents.update(location[:i] for i in range(len(location)))
    return [e for e in problems if e["type"] != "too_short" or tuple(e["loc"]) not in parents]


def _message(error: Mapping[str, Any]) -> str:
    if _is_empty_prompt_set(error):
        return "expected at least one prompt"
    return str(error["msg"]).removeprefix("Value error, ")


def _is_empty_prompt_set(error: Mapping[str, Any]) -> bool:
    return error["type"] == "too_short" and tuple(error["loc"]) == ("body", "prompts")


def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    code = HTTPStatus(error.status_code).name.lower()
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(allowed_methods(request.app, request.scope["path"])))
    return problem(error.status_code, code, str(error.detail), headers=headers)


def routed_methods(app: FastAPI, path: str) -> set[str]:
    """The methods of all routes for the path; the router reports only those of the first route."""
    methods: set[str] = set()
    for route in iter_route_contexts(app.routes):
        if route.path_regex.fullmatch(path):
            methods.update(route.methods or ())
    return methods


def allowed_methods(app: FastAPI, path: str) -> set[str]:
    """The methods that the path supports: those of its routes, and HEAD if one of them is GET."""
    methods = routed_methods(app, path)
    return methods | {"HEAD"} if "GET" in methods else methods


def _unexpected(_request: Request, error: Exception) -> Response:
    _logger.error("unexpected error", exc_info=error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "unexpected error; see the service's log")
