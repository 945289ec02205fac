"""Commands for prompt sets: prompts with their items and mask thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.bodies import read_text
from api.cli.options import Limit, Prompts, fetch_pages, prompt_bodies
from api.cli.screens import listing, sheet, warning_lines
from api.cli.session import Session
from dfusion.errors import InvalidInputError
from dfusion.prompts.files import PromptRows, is_row_file, prompt_rows

if TYPE_CHECKING:
    from api.client import Client
    from api.wire.prompt_sets import PromptSetDetail

app = typer.Typer(no_args_is_help=True, help="Prompt sets: list, show, add, delete.")


@app.command("list")
def list_prompt_sets(ctx: typer.Context, limit: Limit = 50) -> None:
    """List the newest versions of the named prompt sets."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(client.prompt_sets_page, limit)

    rows = (
        (prompt_set.name or prompt_set.id, prompt_set.version, prompt_set.size, prompt_set.description)
        for prompt_set in page.data
    )
    headings = ("name", "version>", "prompts>", "description")
    session.show(page, lambda: listing(headings, rows, page.has_more))


@app.command()
def show(
    ctx: typer.Context, prompt_set: Annotated[str, typer.Argument(metavar="SET", help="The set's name or id")]
) -> None:
    """Show a prompt set with its prompts, items and thresholds."""
    session: Session = ctx.obj
    with session.client() as client:
        details = client.prompt_set(prompt_set)
    session.show(details, lambda: _screen(details))


@app.command()
def add(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the set; an existing name gets a new version")],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="Text file with one prompt per line, .csv, .json, .jsonl, .parquet or the folder of a Hugging Face "
            "data set; - is standard input (lines)",
        ),
    ] = None,
    prompt: Prompts = None,
    description: Annotated[str | None, typer.Option(help="What the prompts have in common")] = None,
) -> None:
    """Add a prompt set. Brackets mark a prompt's items; without brackets the service detects them.

    Examples:
      dfusion prompt-sets add pets --prompt "a \\[cat] on a \\[sofa]"
      dfusion prompt-sets add pets pets.csv
    """
    session: Session = ctx.obj
    if (file is None) == (not prompt):
        raise typer.BadParameter("expected either a file or --prompt")

    with session.client() as client:
        prompt_set = _add(client, name, file, prompt_bodies(prompt), description)
    session.show(prompt_set, lambda: _screen(prompt_set))


@app.command()
def delete(
    ctx: typer.Context, prompt_set: Annotated[str, typer.Argument(metavar="SET", help="The set's name or id")]
) -> None:
    """Delete a prompt set that no job uses: all versions of a name, or one version by its id."""
    session: Session = ctx.obj
    with session.client() as client:
        client.delete_prompt_set(prompt_set)
    session.show(None, lambda: Text(f"{prompt_set} is deleted"))


def _add(
    client: Client, name: str, file: Path | None, prompts: list[dict[str, str]] | None, description: str | None
) -> PromptSetDetail:
    if file is None:
        return client.add_prompt_set(name, prompts or [], description=description)

    if is_row_file(file):
        read = _read_rows(file)
        bodies = [row.fields for row in read.rows]
        return client.add_prompt_set(name, bodies, description=description or read.description)

    media_type: Literal["text/csv", "text/plain"] = "text/csv" if file.suffix == ".csv" else "text/plain"
    return client.add_prompt_text(name, read_text(file), media_type=media_type, description=description)


def _read_rows(file: Path) -> PromptRows:
    try:
        return prompt_rows(file)
    except InvalidInputError as error:
        raise typer.BadParameter(f"{file}: {error}") from error
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from error


def _screen(prompt_set: PromptSetDetail) -> RenderableType:
    fields = {
        "set": prompt_set.id,
        "name": prompt_set.name,
        "version": prompt_set.version,
        "description": prompt_set.description or None,
    }
    rows = []
    for prompt in prompt_set.prompts:
        thresholds = map(str, prompt["thresholds"] or ["derived from samples"])
        rows.append((prompt["text"], ", ".join(prompt["items"]), ", ".join(thresholds)))
    return Group(
        sheet(fields),
        Text(),
        listing(("prompt", "items", "thresholds"), rows),
        *warning_lines(prompt_set.warnings),
    )
