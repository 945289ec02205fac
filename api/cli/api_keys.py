"""API keys: who may do what. All of it takes a key with the scope admin."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.options import Limit, gather
from api.cli.screens import listing, moment, sheet, yes_or_no
from api.cli.session import Session
from api.wire.api_keys import ApiKeyMade
from service.states import KeyScope

app = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke.")


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for")],
    scope: Annotated[list[KeyScope], typer.Option(help="What it is good for; may be given several times")],
    expires_at: Annotated[
        datetime | None, typer.Option(help="When it ends, by this machine's clock; never if not given")
    ] = None,
) -> None:
    """Make a key and show it: this once, and never again.

    Examples:
      dfusion api-keys create ann --scope submit --scope review
      dfusion api-keys create nightly --scope read --expires-at 2099-12-31
    """
    session: Session = ctx.obj
    with session.client() as client:
        made = client.make_api_key(name, scope, expires_at=expires_at and expires_at.astimezone())
    session.answer(made, lambda: _screen(made))


def _screen(made: ApiKeyMade) -> RenderableType:
    fields = {
        "key": made.key,
        "id": made.id,
        "name": made.name,
        "scopes": ", ".join(made.scopes),
        "expires": moment(made.expires_at) if made.expires_at else "never",
    }
    return Group(sheet(fields), Text("\nKeep the key: it is not shown again."))


@app.command("list")
def list_keys(ctx: typer.Context, limit: Limit = 50) -> None:
    """Keys, newest first, by their first characters; revoked and expired ones too."""
    session: Session = ctx.obj
    with session.client() as client:
        found = gather(client.api_keys_page, limit)
    rows = (
        (
            one.id,
            one.name,
            f"{one.prefix}…",
            ", ".join(one.scopes),
            yes_or_no(one.active),
            moment(one.last_used_at),
            moment(one.expires_at),
        )
        for one in found.data
    )
    headings = ("id", "name", "key", "scopes", "active", "last used", "expires")
    session.answer(found, lambda: listing(headings, rows, found.has_more))


@app.command()
def revoke(ctx: typer.Context, key: Annotated[str, typer.Argument(metavar="ID", help="Its id, key_…")]) -> None:
    """Let a key open nothing any more. The last one with the scope admin stays."""
    session: Session = ctx.obj
    with session.client() as client:
        client.revoke_api_key(key)
    session.answer(None, lambda: Text(f"{key} is revoked"))
