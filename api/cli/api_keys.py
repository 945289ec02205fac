"""Commands for API keys. All of them need a key with the scope admin."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.options import Limit, fetch_pages, with_zone
from api.cli.screens import listing, local_time, sheet, yes_or_no
from api.cli.session import Session
from service.states import KeyScope

if TYPE_CHECKING:
    from api.wire.api_keys import ApiKeyCreated

app = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke.")


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Owner or purpose of the key")],
    scope: Annotated[list[KeyScope], typer.Option(help="What the key permits; can be repeated")],
    expires_at: Annotated[
        datetime | None, typer.Option(help="Expiry in local time; the key never expires if not given")
    ] = None,
) -> None:
    """Create a key and show it. It is shown only once.

    Examples:
      dfusion api-keys create ann --scope submit --scope review
      dfusion api-keys create nightly --scope read --expires-at 2099-12-31
    """
    session: Session = ctx.obj
    with session.client() as client:
        api_key = client.create_api_key(name, scope, expires_at=with_zone(expires_at))
    session.show(api_key, lambda: _screen(api_key))


def _screen(api_key: ApiKeyCreated) -> RenderableType:
    fields = {
        "key": api_key.key,
        "id": api_key.id,
        "name": api_key.name,
        "scopes": ", ".join(api_key.scopes),
        "expires": local_time(api_key.expires_at) if api_key.expires_at else "never",
    }
    return Group(sheet(fields), Text("\nStore the key now: it is not shown again."))


@app.command("list")
def list_keys(ctx: typer.Context, limit: Limit = 50) -> None:
    """List keys, newest first, with their first characters. Includes revoked and expired keys."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(client.api_keys_page, limit)

    rows = (
        (
            key.id,
            key.name,
            f"{key.prefix}…",
            ", ".join(key.scopes),
            yes_or_no(key.active),
            local_time(key.last_used_at),
            local_time(key.expires_at),
        )
        for key in page.data
    )
    headings = ("id", "name", "key", "scopes", "active", "last used", "expires")
    session.show(page, lambda: listing(headings, rows, page.has_more))


@app.command()
def revoke(ctx: typer.Context, key: Annotated[str, typer.Argument(metavar="ID", help="The key's id, key_…")]) -> None:
    """Revoke a key. The last key with the scope admin cannot be revoked."""
    session: Session = ctx.obj
    with session.client() as client:
        client.revoke_api_key(key)
    session.show(None, lambda: Text(f"{key} is revoked"))
