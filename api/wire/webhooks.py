"""Webhooks and their deliveries."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from service.states import DeliveryState, WebhookEvent


class WebhookIn(BaseModel):
    """Request to create a webhook."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(min_length=1, max_length=2000, description="Receiver: https:// and a public address")
    events: list[WebhookEvent] = Field(
        list(WebhookEvent), min_length=1, max_length=len(WebhookEvent), description="Events to send; all by default"
    )


class WebhookOut(BaseModel):
    """A webhook without its secret. A disabled one gets no deliveries and cannot be enabled again."""

    id: str
    url: str
    events: list[WebhookEvent]
    created_at: datetime
    disabled_at: datetime | None
    disabled_reason: str | None


class WebhookCreated(WebhookOut):
    """A new webhook with the `secret` of its signatures, which no other response contains."""

    secret: str


class DeliveryOut(BaseModel):
    """A message to a webhook, with its last attempt.

    `next_attempt_at` is null unless the delivery is pending. `last_error` is why the last attempt failed.
    """

    id: str
    webhook: str
    job: str
    event: WebhookEvent
    state: DeliveryState
    attempts: int
    last_status: int | None
    last_error: str | None
    created_at: datetime
    next_attempt_at: datetime | None
    delivered_at: datetime | None
