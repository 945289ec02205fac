"""API keys."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from service.states import KeyScope


class ApiKeyIn(BaseModel):
    """Request to create a key."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100, description="Owner or purpose of the key")
    scopes: list[KeyScope] = Field(
        min_length=1, max_length=4, description="submit and review include read; admin includes all"
    )
    expires_at: AwareDatetime | None = Field(None, description="Expiry, with a time zone; never if not given")

    @field_validator("expires_at")
    @classmethod
    def _convert_to_utc(cls, expires_at: datetime | None) -> datetime | None:
        """Reject times that fall outside the years 1 to 9999 in UTC: datetime cannot represent them."""
        try:
            return None if expires_at is None else expires_at.astimezone(UTC)
        except OverflowError:
            raise ValueError("expected a time within the years 1 to 9999 in UTC") from None


class ApiKeyOut(BaseModel):
    """An API key without its secret. `last_used_at` is accurate to a few minutes."""

    id: str
    name: str
    prefix: str
    scopes: list[KeyScope]
    active: bool
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None


class ApiKeyCreated(ApiKeyOut):
    """A new API key with its secret `key`, which no other response contains."""

    key: str
