"""Conversion of webhooks and their deliveries."""

from __future__ import annotations

from typing import Any

from api.converters.common import maybe_utc, utc
from api.wire.webhooks import DeliveryOut, WebhookCreated, WebhookOut
from service.db.tables import Webhook, WebhookDelivery
from service.states import DeliveryState, WebhookEvent


def webhook_out(row: Webhook) -> WebhookOut:
    return WebhookOut(**_webhook_fields(row))


def webhook_created(row: Webhook, secret: str) -> WebhookCreated:
    return WebhookCreated(**_webhook_fields(row), secret=secret)


def _webhook_fields(row: Webhook) -> dict[str, Any]:
    return {
        "id": row.id,
        "url": row.url,
        "events": row.events,
        "created_at": utc(row.created_at),
        "disabled_at": maybe_utc(row.disabled_at),
        "disabled_reason": row.disabled_reason,
    }


def delivery_out(row: WebhookDelivery) -> DeliveryOut:
    state = DeliveryState(row.state)
    return DeliveryOut(
        id=row.id,
        webhook=row.webhook_id,
        job=row.job_id,
        event=WebhookEvent(row.event),
        state=state,
        attempts=row.attempts,
        last_status=row.last_status,
        last_error=row.last_error,
        created_at=utc(row.created_at),
        next_attempt_at=utc(row.next_attempt_at) if state is DeliveryState.PENDING else None,
        delivered_at=maybe_utc(row.delivered_at),
    )
