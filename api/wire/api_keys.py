"""API keys."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from service.states import KeyScope


class ApiKeyIn(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100, description="Whose key, or what for")
    scopes: list[KeyScope] = Field(
        min_length=1, max_length=4, description="submit and review include read; admin includes all"
    )
    expires_at: AwareDatetime | None = Field(None, description="With a time zone; never if not given")

    @field_validator("expires_at")
    @classmethod
    def _has_a_date_in_utc(cls, at: datetime | None) -> datetime | None:
        """The west's last hours of the year 9999 are of the year 10000 in UTC, which no answer could show."""
        try:
            return None if at is None else at.astimezone(UTC)
        except OverflowError:
            raise ValueError("expected a time within the years 1 to 9999 in UTC") from None


class ApiKeyOut(BaseModel):
    """A key, without itself. `last_used_at` is some minutes coarse."""

    id: str
    name: str
    prefix: str
    scopes: list[KeyScope]
    active: bool
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None


class ApiKeyMade(ApiKeyOut):
    """A key that was just made, with itself: it is not shown again."""

    key: str
