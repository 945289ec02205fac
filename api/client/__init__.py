"""The Python client of the REST API. `Client` is loaded on first use, because help and completion need no client."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from api.client.client import Client

__all__ = [
    "DEFAULT_URL",
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

DEFAULT_URL = "http://127.0.0.1:8000"


def __getattr__(name: str) -> Any:
    """Import the client on first use (PEP 562)."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from api.client.client import Client

    globals()[name] = Client
    return Client
