"""Commands for webhooks and their deliveries. All of them need a key with the scope admin."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from api.cli.options import Limit, fetch_pages
from api.cli.screens import listing, local_time, sheet
from api.cli.session import Session
from service.states import WebhookEvent

app = typer.Typer(no_args_is_help=True, help="Webhooks: create, list, remove; deliveries and their replay.")

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id, whk_…")]


@app.command()
def create(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(help="Receiver: https:// and a public address")],
    event: Annotated[
        list[WebhookEvent] | None, typer.Option(help="Event to send; can be repeated. Default: all")
    ] = None,
) -> None:
    """Create a webhook and show the secret of its signatures. It is shown only once.

    Example: dfusion webhooks create https://example.org/dfusion --event job.failed --event job.waiting
    """
    session: Session = ctx.obj
    with session.client() as client:
        webhook = client.create_webhook(url, event or tuple(WebhookEvent))

    fields = {"secret": webhook.secret, "id": webhook.id, "url": webhook.url, "events": ", ".join(webhook.events)}
    note = Text("\nStore the secret now: it is not shown again.")
    session.show(webhook, lambda: Group(sheet(fields), note))


@app.command("list")
def list_webhooks(ctx: typer.Context, limit: Limit = 50) -> None:
    """List webhooks, newest first, including those that were disabled in the last 30 days."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(client.webhooks_page, limit)

    rows = ((hook.id, hook.url, ", ".join(hook.events), hook.disabled_reason or "-") for hook in page.data)
    headings = ("id", "url", "events", "disabled")
    session.show(page, lambda: listing(headings, rows, page.has_more))


@app.command()
def remove(ctx: typer.Context, webhook: WebhookId) -> None:
    """Disable a webhook for good. Pending deliveries are not sent."""
    session: Session = ctx.obj
    with session.client() as client:
        client.remove_webhook(webhook)
    session.show(None, lambda: Text(f"{webhook} is disabled"))


@app.command()
def deliveries(
    ctx: typer.Context,
    webhook: Annotated[str | None, typer.Option(metavar="WEBHOOK", help="Only those of this webhook")] = None,
    limit: Limit = 50,
) -> None:
    """List the deliveries of the last 30 days, newest first, with the outcome of the last attempt."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(lambda count, cursor: client.webhook_deliveries_page(webhook, count, cursor), limit)

    rows = (
        (
            delivery.id,
            delivery.event,
            delivery.job,
            delivery.state,
            delivery.attempts,
            delivery.last_error or delivery.last_status or "-",
            local_time(delivery.next_attempt_at),
        )
        for delivery in page.data
    )
    headings = ("id", "event", "job", "state", "attempts>", "last attempt", "next attempt")
    session.show(page, lambda: listing(headings, rows, page.has_more))


@app.command()
def replay(
    ctx: typer.Context, delivery: Annotated[str, typer.Argument(metavar="DELIVERY", help="The delivery's id, dlv_…")]
) -> None:
    """Send a delivery again, with the same id. Its webhook must not be disabled."""
    session: Session = ctx.obj
    with session.client() as client:
        replayed = client.replay_webhook_delivery(delivery)
    session.show(replayed, lambda: Text(f"{delivery} is sent again"))
