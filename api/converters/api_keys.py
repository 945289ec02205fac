"""Conversion of API keys."""

from __future__ import annotations

from typing import Any

from api.converters.common import maybe_utc, utc
from api.wire.api_keys import ApiKeyCreated, ApiKeyOut
from service.db.tables import ApiKey


def api_key_out(row: ApiKey, now: float) -> ApiKeyOut:
    return ApiKeyOut(**_api_key_fields(row, now))


def api_key_created(row: ApiKey, now: float, token: str) -> ApiKeyCreated:
    return ApiKeyCreated(**_api_key_fields(row, now), key=token)


def _api_key_fields(row: ApiKey, now: float) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": row.scopes,
        "active": row.revoked_at is None and (row.expires_at is None or row.expires_at > now),
        "created_at": utc(row.created_at),
        "last_used_at": maybe_utc(row.last_used_at),
        "expires_at": maybe_utc(row.expires_at),
        "revoked_at": maybe_utc(row.revoked_at),
    }
