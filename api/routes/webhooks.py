"""Routes of webhooks and their deliveries. They need a key with the scope admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response, status

from api.access import require_scope
from api.converters.common import convert_page
from api.converters.webhooks import delivery_out, webhook_created, webhook_out
from api.deps import PageParameters, ServiceDep
from api.openapi import CREATED_WEBHOOK
from api.wire.common import ListOut
from api.wire.webhooks import DeliveryOut, WebhookCreated, WebhookIn, WebhookOut
from service import webhooks
from service.db.queries import webhooks as rows
from service.ids import IdKind, expect

router = APIRouter(tags=["webhooks"], dependencies=[require_scope("admin")])


class DeliveryListParameters(PageParameters):
    """Filters of the list of deliveries."""

    webhook: str | None = None


@router.post("/webhooks", status_code=status.HTTP_201_CREATED, responses={status.HTTP_201_CREATED: CREATED_WEBHOOK})
def create_webhook(body: WebhookIn, service: ServiceDep) -> WebhookCreated:
    """Create a webhook. Only this response contains the secret of its signatures.

    Messages follow the Standard Webhooks specification. An attempt that gets no 2xx is repeated for three days.
    """
    with service.uow.writing() as session:
        row, secret = webhooks.create(service, session, body.url, body.events)
        session.refresh(row)
        return webhook_created(row, secret)


@router.get("/webhooks")
def list_webhooks(service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[WebhookOut]:
    """List webhooks, newest first, including those that were disabled in the last 30 days."""
    with service.uow.reading() as session:
        return convert_page(ListOut[WebhookOut], rows.page(session, page.limit, page.cursor), webhook_out)


@router.delete("/webhooks/{webhook_id}", status_code=status.HTTP_204_NO_CONTENT, response_class=Response)
def remove_webhook(webhook_id: str, service: ServiceDep) -> None:
    """Disable a webhook and forget its secret. Pending deliveries are not sent."""
    with service.uow.writing() as session:
        rows.disable(session, rows.get(session, webhook_id).id, "removed")


@router.get("/webhook-deliveries")
def list_webhook_deliveries(
    service: ServiceDep, filters: Annotated[DeliveryListParameters, Query()]
) -> ListOut[DeliveryOut]:
    """List deliveries of the last 30 days, newest first."""
    webhook_id = None if filters.webhook is None else expect(IdKind.WEBHOOK, filters.webhook)
    with service.uow.reading() as session:
        page = rows.delivery_page(session, filters.limit, filters.cursor, webhook_id)
        return convert_page(ListOut[DeliveryOut], page, delivery_out)


@router.post("/webhook-deliveries/{delivery_id}/replay", status_code=status.HTTP_202_ACCEPTED)
def replay_webhook_delivery(delivery_id: str, service: ServiceDep) -> DeliveryOut:
    """Send a delivery again, with the same id. 409 if its webhook is disabled."""
    with service.uow.writing() as session:
        return delivery_out(webhooks.replay(session, delivery_id))
