"""Webhooks: signed messages about jobs to addresses of users, by the Standard Webhooks specification.

A delivery is a row, written in the transaction of the change that it reports. Maintenance sends due deliveries. A
receiver may get a message twice, for example if this process dies before it records the response; the `webhook-id` is
the same.
"""

from __future__ import annotations

import base64
import logging
import random
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus

import standardwebhooks
from sqlalchemy.orm import Session

from service import outgoing
from service.db.locks import AdvisoryLock, hold
from service.db.queries import webhooks
from service.db.tables import Webhook, WebhookDelivery
from service.db.unit_of_work import repeatable
from service.errors import AddressRefusedError, ConflictError, InvalidRequestError, OutgoingError
from service.service import Service
from service.states import WebhookEvent

MAX_WEBHOOKS = 20
_SECRET_BYTES = 32
_PAUSES_SECONDS = (5, 60, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Pauses between attempts, three days in all. After the last one a delivery has failed."""
_PER_WEBHOOK = 5
"""Deliveries of one webhook that are sent at a time, so that a slow receiver takes no more of the senders."""
_SENDERS = 8
_LEASE_SECONDS = 300.0
"""A delivery without a recorded outcome is sent again after this time. A batch takes less, even if each of its
receivers is slow: 20 webhooks with 5 deliveries of 10 s, 8 at a time."""
_logger = logging.getLogger(__name__)


def create(service: Service, session: Session, url: str, events: Sequence[WebhookEvent]) -> tuple[Webhook, str]:
    """Create a webhook.

    Returns:
        The row, and the secret of its signatures, which no later response contains.

    Raises:
        InvalidRequestError: The URL is not allowed.
        ConflictError: There are too many webhooks.
    """
    try:
        outgoing.check_url(url, service.settings.webhooks_allow_loopback)
    except AddressRefusedError as error:
        raise InvalidRequestError.at("/url", str(error)) from error

    hold(session, AdvisoryLock.WEBHOOKS)
    if len(webhooks.enabled(session)) >= MAX_WEBHOOKS:
        raise ConflictError(f"the limit of {MAX_WEBHOOKS} webhooks is reached: remove one first")
    secret = f"whsec_{base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()}"
    return webhooks.add(session, url, sorted(set(events)), secret), secret


def replay(session: Session, delivery_id: str) -> WebhookDelivery:
    """Send a delivery again. Raises NotFoundError, or ConflictError if its webhook is disabled."""
    delivery = webhooks.get_delivery(session, delivery_id)
    if webhooks.get(session, delivery.webhook_id).disabled_at is not None:
        raise ConflictError(f"{delivery.webhook_id} is disabled: create a new webhook")
    webhooks.replay(session, delivery.id)
    session.refresh(delivery)
    return delivery


@dataclass(frozen=True)
class _Message:
    """A claimed delivery with its receiver."""

    delivery: WebhookDelivery
    url: str
    secret: str


@dataclass(frozen=True)
class _Outcome:
    """The outcome of an attempt: the status of the response, or why there was none."""

    status: int | None
    error: str | None

    @property
    def is_accepted(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def deliver_due(service: Service) -> int:
    """Send a batch of due deliveries.

    Returns:
        The number of deliveries in the batch.
    """
    with service.uow.reading() as session:
        receivers = webhooks.enabled(session)
    if not receivers:
        return 0

    messages: list[_Message] = []
    with service.uow.writing() as session:
        for receiver in receivers:
            due = webhooks.claim_due(session, receiver.id, _PER_WEBHOOK, _LEASE_SECONDS)
            messages += [_Message(delivery, receiver.url, receiver.secret) for delivery in due]

    with ThreadPoolExecutor(_SENDERS, thread_name_prefix="webhook") as senders:
        list(senders.map(lambda message: _deliver(service, message), messages))
    return len(messages)


def _deliver(service: Service, message: _Message) -> None:
    outcome = _send(service, message)
    delivery = message.delivery
    _logger.info("%s to %s: %s", delivery.id, delivery.webhook_id, outcome.error or outcome.status)
    service.uow.run(lambda session: _record(session, delivery, outcome), repeatable)


def _send(service: Service, message: _Message) -> _Outcome:
    delivery = message.delivery
    now = datetime.now(UTC)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "dfusion-webhooks",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": standardwebhooks.Webhook(message.secret).sign(delivery.id, now, delivery.body),
    }

    try:
        allow_loopback = service.settings.webhooks_allow_loopback
        status = outgoing.post(message.url, headers, delivery.body.encode(), allow_loopback)
    except (AddressRefusedError, OutgoingError) as error:
        return _Outcome(None, str(error))
    return _Outcome(status, None)


def _record(session: Session, delivery: WebhookDelivery, outcome: _Outcome) -> None:
    # 1. accepted
    status = outcome.status
    if status is not None and outcome.is_accepted:
        webhooks.record_delivered(session, delivery, status)
        return

    # 2. the receiver is gone
    error = outcome.error or f"status {status}"
    if status == HTTPStatus.GONE:
        webhooks.disable(session, delivery.webhook_id, "the receiver responded with 410 (Gone)")
        webhooks.record_failed(session, delivery, status, error)
        return

    # 3. again later, or no more
    if delivery.attempts > len(_PAUSES_SECONDS):
        webhooks.record_failed(session, delivery, status, error)
        return
    pause = _PAUSES_SECONDS[delivery.attempts - 1] * random.uniform(0.8, 1.2)
    webhooks.record_retry(session, delivery, status, error, pause)
