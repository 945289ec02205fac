"""The Python client of the REST API."""

from api.client.client import Client
from api.client.errors import (
    ApiError,
    ConflictError,
    DownloadError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
    UnreachableError,
)

__all__ = [
    "ApiError",
    "Client",
    "ConflictError",
    "DownloadError",
    "ForbiddenError",
    "InvalidError",
    "NotFoundError",
    "PreconditionError",
    "TooManyRequestsError",
    "UnauthorizedError",
    "UnavailableError",
    "UnreachableError",
]
