"""Prompt sets: prompts with their items and mask thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.bodies import read_json, read_text
from api.cli.options import Limit, Prompts, gather, texts
from api.cli.screens import listing, sheet
from api.cli.session import Session
from api.client import Client
from api.wire.prompt_sets import PromptSetDetail

app = typer.Typer(no_args_is_help=True, help="Prompt sets: list, show, add.")


@app.command("list")
def list_prompt_sets(ctx: typer.Context, limit: Limit = 50) -> None:
    """Prompt sets that have a name, in their newest versions."""
    session: Session = ctx.obj
    with session.client() as client:
        found = gather(client.prompt_sets_page, limit)
    rows = ((one.name or one.id, one.version, one.size, one.description) for one in found.data)
    headings = ("name", "version>", "prompts>", "description")
    session.answer(found, lambda: listing(headings, rows, found.has_more))


@app.command()
def show(ctx: typer.Context, prompt_set: Annotated[str, typer.Argument(metavar="SET", help="Its name or id")]) -> None:
    """A prompt set with its prompts, their items and thresholds."""
    session: Session = ctx.obj
    with session.client() as client:
        found = client.prompt_set(prompt_set)
    session.answer(found, lambda: _screen(found))


@app.command()
def add(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Under a name that is there already it is the next version")],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A prompt a line; or .csv, or .json. - is standard input, lines"),
    ] = None,
    prompt: Prompts = None,
    description: Annotated[str | None, typer.Option(help="What the prompts have in common")] = None,
) -> None:
    """Add a prompt set. Brackets mark a prompt's items; without them the service finds the things that it names.

    Examples:
      dfusion prompt-sets add pets --prompt "a \\[cat] on a \\[sofa]"
      dfusion prompt-sets add pets pets.csv
    """
    session: Session = ctx.obj
    if (file is None) == (not prompt):
        raise typer.BadParameter("expected either a file or --prompt")
    with session.client() as client:
        found = _added(client, name, file, texts(prompt), description)
    session.answer(found, lambda: _screen(found))


def _added(
    client: Client, name: str, file: Path | None, prompts: list[dict[str, str]] | None, description: str | None
) -> PromptSetDetail:
    if file is None:
        return client.add_prompt_set(name, prompts or [], description=description)
    if file.suffix == ".json":
        body = read_json(file)
        described = body.get("description") if isinstance(body, dict) else None
        listed = body.get("prompts") if isinstance(body, dict) else body
        if not isinstance(listed, list) or not all(isinstance(one, dict | str) for one in listed):
            raise typer.BadParameter(f"{file}: expected a list of prompts, or an object with one, `prompts`")
        whole: list[Any] = [{"text": one} if isinstance(one, str) else one for one in listed]
        return client.add_prompt_set(name, whole, description=description or described)
    media_type: Literal["text/csv", "text/plain"] = "text/csv" if file.suffix == ".csv" else "text/plain"
    return client.add_prompt_text(name, read_text(file), media_type=media_type, description=description)


def _screen(found: PromptSetDetail) -> RenderableType:
    fields = {"set": found.id, "name": found.name, "version": found.version, "description": found.description or None}
    rows = (
        (one["text"], ", ".join(one["items"]), ", ".join(map(str, one["thresholds"] or ["found from samples"])))
        for one in found.prompts
    )
    return Group(sheet(fields), Text(), listing(("prompt", "items", "thresholds"), rows))
