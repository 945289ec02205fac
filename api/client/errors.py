"""Errors of the client.

ApiError
  UnreachableError        no response: connection error or timeout
  InvalidError            400, 413, 415, 422: the request is invalid
  UnauthorizedError       401: the API key is missing or invalid
    ForbiddenError        403: the API key lacks the required scope
  NotFoundError           404: the resource does not exist
  ConflictError           409: the request conflicts with the current state
    PreconditionError     412: the resource has changed since it was read
  TooManyRequestsError    429: too many requests or queued jobs
  UnavailableError        502, 503, 504: the service is temporarily unavailable
  DownloadError           the downloaded bytes have another SHA-256
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from api.wire.common import FieldError, Problem

if TYPE_CHECKING:
    import httpx


class ApiError(Exception):
    """Base class of the client's errors.

    Attributes:
        status: The HTTP status; None if there was no response.
        code: A machine-readable code.
        detail: A human-readable message.
        errors: The invalid fields of the request.
    """

    def __init__(
        self, detail: str, *, status: int | None = None, code: str = "error", errors: Sequence[FieldError] = ()
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)


class UnreachableError(ApiError):
    """No response: connection error or timeout."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, code="unreachable")


class InvalidError(ApiError):
    """The request is invalid."""


class UnauthorizedError(ApiError):
    """The API key is missing or invalid."""


class ForbiddenError(UnauthorizedError):
    """The API key lacks the required scope."""


class NotFoundError(ApiError):
    """The resource does not exist."""


class ConflictError(ApiError):
    """The request conflicts with the current state."""


class PreconditionError(ConflictError):
    """The resource has changed since it was read."""


class TooManyRequestsError(ApiError):
    """Too many requests or queued jobs. Retry later."""


class UnavailableError(ApiError):
    """The service is temporarily unavailable."""


class DownloadError(ApiError):
    """The downloaded bytes have another SHA-256."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, code="download")


_TYPES: Mapping[int, type[ApiError]] = MappingProxyType(
    {
        400: InvalidError,
        401: UnauthorizedError,
        403: ForbiddenError,
        404: NotFoundError,
        409: ConflictError,
        412: PreconditionError,
        413: InvalidError,
        415: InvalidError,
        422: InvalidError,
        429: TooManyRequestsError,
        502: UnavailableError,
        503: UnavailableError,
        504: UnavailableError,
    }
)
_MAX_TEXT = 200
"""Characters shown of a response that is not a problem document, such as a proxy's error page."""


def error_from(response: httpx.Response) -> ApiError:
    """Convert an error response to an exception. The body must have been read."""
    error_type = _TYPES.get(response.status_code, ApiError)
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        text = " ".join(response.text.split())[:_MAX_TEXT]
        detail = f"{response.request.method} {response.request.url.path} returned {response.status_code}: {text}"
        return error_type(detail, status=response.status_code, code=f"http_{response.status_code}")
    return error_type(problem.detail, status=response.status_code, code=problem.code, errors=problem.errors)
