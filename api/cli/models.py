"""Models: base models and adapters, where they came from, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.jobs import followed, job_sheet
from api.cli.options import Follow, Key, Limit, OfJob, gather
from api.cli.screens import figure, listing, moment, sheet, size
from api.cli.session import Session
from api.wire.models import ModelDetail, ModelOut

app = typer.Typer(no_args_is_help=True, help="Models: list, show, lineage, export, download, alias.")
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id, its name or an alias")]
Format = Literal["diffusers", "kohya", "merged"]
FormatOption = Annotated[
    Format,
    typer.Option("--format", help="diffusers: for load_lora_weights; kohya: ComfyUI, A1111; merged: a whole pipeline"),
]


@app.command("list")
def list_models(ctx: typer.Context, job: OfJob = None, limit: Limit = 20) -> None:
    """Models, newest first."""
    session: Session = ctx.obj
    with session.client() as client:
        found = gather(lambda size, cursor: client.models_page(size, cursor, job=job), limit)
    headings = ("model", "name", "base", "round>", "aliases", "made at")
    session.answer(found, lambda: listing(headings, (_row(model) for model in found.data), found.has_more))


def _row(model: ModelOut) -> tuple[Any, ...]:
    number = "" if model.round is None else model.round
    return model.id, model.name or "", model.base, number, ", ".join(model.aliases), moment(model.created_at)


@app.command()
def show(ctx: typer.Context, model: ModelName) -> None:
    """A model: its file, its parent, how its training went, and its exports."""
    session: Session = ctx.obj
    with session.client() as client:
        found = client.model(model)
    session.answer(found, lambda: _sheet(found))


@app.command()
def lineage(ctx: typer.Context, model: ModelName) -> None:
    """Where a model came from, down to the base model: job, round, seed and prompts of each."""
    session: Session = ctx.obj
    with session.client() as client:
        found = client.lineage(model)
    headings = ("model", "base", "round>", "seed>", "job")
    rows = ((one.model, one.base, _or_blank(one.round), _or_blank(one.seed), one.job or "") for one in found.data)
    session.answer(found, lambda: listing(headings, rows))


@app.command()
def export(
    ctx: typer.Context, model: ModelName, format: FormatOption = "kohya", follow: Follow = False, key: Key = None
) -> None:
    """Write a model for other programs, by a job that checks that the file gives the same image. Then download it.

    Example:
      dfusion models export champion --format kohya --follow
      dfusion models download champion flowers.safetensors --format kohya
    """
    session: Session = ctx.obj
    with session.client() as client:
        made = client.start_export({"model": client.model(model).id, "format": format}, idempotency_key=key)
        if follow:
            followed(session, client, made.id)
        else:
            session.answer(made, lambda: job_sheet(made))


@app.command()
def download(
    ctx: typer.Context,
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Where to write it; what is there is replaced")],
    format: FormatOption = "diffusers",
) -> None:
    """Write a model's file, checked by its SHA-256. Formats other than diffusers must be exported first.

    Example: dfusion models download mdl_… adapter.safetensors
    """
    session: Session = ctx.obj
    with session.client() as client:
        file.parent.mkdir(parents=True, exist_ok=True)
        sha256 = client.download_model(model, file, format=format)
    found = {"model": model, "format": format, "file": str(file), "sha256": sha256}
    session.answer(found, lambda: sheet({"file": file, "size": size(file.stat().st_size), "sha256": sha256}))


@app.command()
def alias(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help='Such as "champion"')],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="What it shall mean from now on")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Let it mean nothing any more")] = False,
) -> None:
    """Let a name mean a model, or nothing any more. Aliases can stand wherever a model is named.

    Examples:
      dfusion models alias champion mdl_…
      dfusion models alias champion --remove
    """
    session: Session = ctx.obj
    if remove == (model is not None):
        raise typer.BadParameter("expected a model, or --remove")
    with session.client() as client:
        if model is None:
            client.remove_alias(name)
            session.answer(None, lambda: Text(f"{name} means nothing any more"))
            return
        found = client.set_alias(name, client.model(model).id)
    session.answer(found, lambda: _sheet(found))


def _or_blank(value: int | None) -> int | str:
    return "" if value is None else value


def _sheet(model: ModelDetail) -> RenderableType:
    fields = {
        "model": model.id,
        "name": model.name,
        "base": model.base,
        "aliases": ", ".join(model.aliases) or None,
        "parent": model.parent,
        "job": model.job and f"{model.job}, round {model.round}",
        "adapter": model.adapter and f"{model.adapter.artifact}, {size(model.adapter.size_bytes)}",
        "sha256": model.adapter and model.adapter.sha256,
        "made at": moment(model.created_at),
    }
    figures = {name: figure(value) for name, value in model.figures.items() if isinstance(value, int | float)}
    parts: list[RenderableType] = [sheet(fields | figures)]
    if model.exports:
        rows = ((one.id, one.format, one.artifact, moment(one.created_at)) for one in model.exports)
        parts += [Text(), listing(("export", "format", "file", "made at"), rows)]
    return Group(*parts)
