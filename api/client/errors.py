"""Every error that the client raises on purpose.

ApiError
  UnreachableError        no answer came
  InvalidError            400, 413, 415, 422: the request asks for something that cannot be
  UnauthorizedError       401: the service asks for an API key, or does not know this one
    ForbiddenError        403: the key's scopes do not reach so far
  NotFoundError           404: there is nothing of that id
  ConflictError           409: what was asked does not fit the present state
    PreconditionError     412: what was to be changed has changed since it was read
  TooManyRequestsError    429: too many requests or queued jobs; try again later
  UnavailableError        502, 503, 504: the service cannot work just now
  DownloadError           the bytes that came are not those that the service has
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import httpx
from pydantic import ValidationError

from api.wire.common import FieldError, Problem


class ApiError(Exception):
    """Root of the client's errors. `status` is None where no answer came; `code` is for programs, `detail` for people,
    and `errors` say which fields are wrong."""

    def __init__(
        self, detail: str, *, status: int | None = None, code: str = "error", errors: Sequence[FieldError] = ()
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.errors = status, code, detail, tuple(errors)


class UnreachableError(ApiError):
    """No answer came."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, code="unreachable")


class InvalidError(ApiError):
    """The request asks for something that cannot be."""


class UnauthorizedError(ApiError):
    """The service asks for an API key, or does not know this one."""


class ForbiddenError(UnauthorizedError):
    """The key's scopes do not reach so far."""


class NotFoundError(ApiError):
    """There is nothing of that id."""


class ConflictError(ApiError):
    """What was asked does not fit the present state."""


class PreconditionError(ConflictError):
    """What was to be changed has changed since it was read."""


class TooManyRequestsError(ApiError):
    """Too many requests or queued jobs; try again later."""


class UnavailableError(ApiError):
    """The service cannot work just now."""


class DownloadError(ApiError):
    """The bytes that came are not those that the service has."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, code="download")


_KINDS: Mapping[int, type[ApiError]] = MappingProxyType(
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
_SHOWN = 200
"""Characters of an answer that is no problem document (a proxy's page) that are worth showing."""


def error_of(answer: httpx.Response) -> ApiError:
    """The error that an answer tells of. Its body must have been read."""
    kind = _KINDS.get(answer.status_code, ApiError)
    try:
        found = Problem.model_validate_json(answer.content)
    except ValidationError:
        text = " ".join(answer.text.split())[:_SHOWN]
        detail = f"{answer.request.method} {answer.request.url.path} answered {answer.status_code}: {text}"
        return kind(detail, status=answer.status_code, code=f"http_{answer.status_code}")
    return kind(found.detail, status=answer.status_code, code=found.code, errors=found.errors)
