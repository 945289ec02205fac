"""Queries over webhooks and their deliveries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, exists, select, text, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries.pages import Page, fetch_page
from service.db.queries.rows import UNSYNCED, get_row, is_any_of
from service.db.tables import Job, Webhook, WebhookDelivery
from service.ids import IdKind, new_id
from service.states import DeliveryState

_IS_ENABLED = text("disabled_at IS NULL")
_IS_PENDING = text("state = 'pending'")


def add(session: Session, url: str, events: Sequence[str], secret: str) -> Webhook:
    """Insert a webhook."""
    row = Webhook(id=new_id(IdKind.WEBHOOK), url=url, events=list(events), secret=secret, created_at=now_seconds())
    session.add(row)
    session.flush()
    return row


def get(session: Session, webhook_id: str) -> Webhook:
    """The webhook. Raises NotFoundError."""
    return get_row(session, Webhook, IdKind.WEBHOOK, webhook_id)


def enabled(session: Session) -> list[Webhook]:
    """All webhooks that are not disabled."""
    return list(session.scalars(select(Webhook).where(_IS_ENABLED).order_by(Webhook.id)))


def page(session: Session, limit: int, cursor: str | None) -> Page[Webhook]:
    """Webhooks, newest first, including disabled ones."""
    return fetch_page(session, select(Webhook), Webhook.id, limit, cursor, newest_first=True)


def disable(session: Session, webhook_id: str, reason: str) -> None:
    """Disable a webhook and delete its secret. One that is already disabled keeps its reason."""
    query = update(Webhook).where(Webhook.id == webhook_id, Webhook.disabled_at.is_(None))
    session.execute(query.values(disabled_at=now_seconds(), disabled_reason=reason, secret=""))


def announce(session: Session, job_id: str, event: str) -> None:
    """Add a delivery of the event of a job for each webhook that wants it."""
    wanting = [row.id for row in enabled(session) if event in row.events]
    if not wanting:
        return

    columns = (Job.kind, Job.state, Job.label, Job.error_code, Job.stopped, now_seconds())
    kind, state, label, error_code, stopped, now = session.execute(select(*columns).where(Job.id == job_id)).one()
    data = {"job": job_id, "kind": kind, "state": state, "label": label, "error": error_code, "stopped": stopped}
    body = {"type": event, "timestamp": datetime.fromtimestamp(now, UTC).isoformat(), "data": data}
    session.add_all(
        WebhookDelivery(
            id=new_id(IdKind.WEBHOOK_DELIVERY),
            webhook_id=webhook_id,
            job_id=job_id,
            event=event,
            body=json.dumps(body, ensure_ascii=False),
            state=DeliveryState.PENDING,
            attempts=0,
            next_attempt_at=now_seconds(),
            created_at=now_seconds(),
        )
        for webhook_id in wanting
    )
    session.flush()


def get_delivery(session: Session, delivery_id: str) -> WebhookDelivery:
    """The delivery. Raises NotFoundError."""
    return get_row(session, WebhookDelivery, IdKind.WEBHOOK_DELIVERY, delivery_id)


def delivery_page(session: Session, limit: int, cursor: str | None, webhook_id: str | None) -> Page[WebhookDelivery]:
    """Deliveries, newest first."""
    equal = {WebhookDelivery.webhook_id: webhook_id}
    key = WebhookDelivery.id
    return fetch_page(session, select(WebhookDelivery), key, limit, cursor, newest_first=True, equal=equal)


def claim_due(session: Session, webhook_id: str, limit: int, lease_seconds: float) -> list[WebhookDelivery]:
    """Claim the oldest deliveries of a webhook that are due. Each becomes due again when its lease ends."""
    now = now_seconds()
    query = (
        select(WebhookDelivery)
        .where(_IS_PENDING, WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.next_attempt_at <= now)
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = list(session.scalars(query))
    for row in rows:
        row.attempts += 1
        row.next_attempt_at = now + lease_seconds
    session.flush()
    return rows


def record_delivered(session: Session, delivery: WebhookDelivery, status: int) -> None:
    """Record that the receiver has accepted the delivery."""
    _record(session, delivery, status, None, state=DeliveryState.DELIVERED, delivered_at=now_seconds())


def record_failed(session: Session, delivery: WebhookDelivery, status: int | None, error: str) -> None:
    """Record that the delivery has failed permanently."""
    _record(session, delivery, status, error, state=DeliveryState.FAILED)


def record_retry(
    session: Session, delivery: WebhookDelivery, status: int | None, error: str, pause_seconds: float
) -> None:
    """Record a failed attempt, and send the delivery again after the pause."""
    _record(session, delivery, status, error, next_attempt_at=now_seconds() + pause_seconds)


def _record(
    session: Session, delivery: WebhookDelivery, status: int | None, error: str | None, **values: object
) -> None:
    """Record the outcome of an attempt, unless another attempt has begun since or the delivery was replayed."""
    query = update(WebhookDelivery).where(
        WebhookDelivery.id == delivery.id, WebhookDelivery.attempts == delivery.attempts, _IS_PENDING
    )
    session.execute(query.values(last_status=status, last_error=error, **values), execution_options=UNSYNCED)


def replay(session: Session, delivery_id: str) -> None:
    """Send the delivery again, with its id, from the first attempt."""
    query = update(WebhookDelivery).where(WebhookDelivery.id == delivery_id)
    session.execute(
        query.values(state=DeliveryState.PENDING, attempts=0, next_attempt_at=now_seconds(), delivered_at=None)
    )


def forget_old(session: Session, before: float, limit: int) -> int | None:
    """Delete up to `limit` deliveries that were created before this time, then webhooks that were disabled before it.

    Returns:
        Their number; None if there are none.
    """
    created_at = WebhookDelivery.created_at
    oldest = select(WebhookDelivery.id).where(created_at < before).order_by(created_at).limit(limit)
    ids = list(session.scalars(oldest))
    if ids:
        session.execute(delete(WebhookDelivery).where(is_any_of(WebhookDelivery.id, ids)), execution_options=UNSYNCED)
        return len(ids)

    has_delivery = exists().where(WebhookDelivery.webhook_id == Webhook.id)
    disabled = select(Webhook.id).where(Webhook.disabled_at < before, ~has_delivery).limit(limit)
    hooks = list(session.scalars(disabled))
    session.execute(delete(Webhook).where(is_any_of(Webhook.id, hooks)), execution_options=UNSYNCED)
    return len(hooks) or None
