"""Commands for models: base models, adapters, their lineage and their files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.jobs import follow_to_end, job_sheet
from api.cli.model_check import check_model, report_sheet
from api.cli.options import Follow, Key, Limit, OfJob, fetch_pages
from api.cli.screens import figure, listing, local_time, sheet, size
from api.cli.session import Session
from dfusion.config import Precision
from dfusion.recipes import ExportFormat

if TYPE_CHECKING:
    from api.wire.models import ExportOut, ModelDetail, ModelOut

app = typer.Typer(no_args_is_help=True, help="Models: list, show, check, lineage, export, exports, download, alias.")
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id, its name or an alias")]
FormatOption = Annotated[
    ExportFormat,
    typer.Option(
        "--format",
        help="diffusers: for load_lora_weights; kohya: for ComfyUI and A1111; peft: for PeftModel; "
        "merged: a complete pipeline",
    ),
]


@app.command("list")
def list_models(ctx: typer.Context, job: OfJob = None, limit: Limit = 20) -> None:
    """List models, newest first."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(lambda size, cursor: client.models_page(size, cursor, job=job), limit)

    headings = ("model", "name", "base", "round>", "aliases", "created at")
    session.show(page, lambda: listing(headings, map(_row, page.data), page.has_more))


def _row(model: ModelOut) -> tuple[Any, ...]:
    aliases = ", ".join(model.aliases)
    return model.id, model.name or "", model.base, _or_blank(model.round), aliases, local_time(model.created_at)


@app.command()
def show(ctx: typer.Context, model: ModelName) -> None:
    """Show a model: its file, its parent, its training statistics and its newest exports."""
    session: Session = ctx.obj
    with session.client() as client:
        details = client.model(model)
    session.show(details, lambda: _sheet(details))


@app.command()
def check(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a model of DFUSION_MODELS, or a hub name")],
    image: Annotated[Path, typer.Option(help="PNG file of the sampled image; replaced")] = Path("model-check.png"),
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to sample with: a safetensors file or its folder")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of the image")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default 20")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels. Default: the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision of the U-Net and text encoders")] = None,
    vae_dtype: Annotated[Precision | None, typer.Option(help="Precision of the VAE")] = None,
) -> None:
    """Load a base model on this machine, describe it, and sample one image. Needs no service.

    A model that cannot be run is refused with the cause, and the exit code is 1.

    Example: dfusion models check ./my-model --dtype float16 --image sample.png
    """
    session: Session = ctx.obj
    values = {"num_steps": steps, "height": height, "width": width}
    sampling = {name: value for name, value in values.items() if value is not None}
    options = {"prompt": prompt, "seed": seed, "device": device, "dtype": dtype, "vae_dtype": vae_dtype}
    if adapter is not None:
        options["adapter"] = str(adapter)
    report = check_model(model, image, {**options, "sampling": sampling})
    session.show(report, lambda: report_sheet(report))


@app.command()
def lineage(ctx: typer.Context, model: ModelName) -> None:
    """Show a model's ancestors down to the base model, each with its job, round and seed."""
    session: Session = ctx.obj
    with session.client() as client:
        lineage = fetch_pages(lambda size, cursor: client.lineage_page(model, size, cursor), sys.maxsize)

    headings = ("model", "base", "round>", "seed>", "job")
    rows = (
        (ancestor.model, ancestor.base, _or_blank(ancestor.round), _or_blank(ancestor.seed), ancestor.job or "")
        for ancestor in lineage.data
    )
    session.show(lineage, lambda: listing(headings, rows))


@app.command()
def exports(ctx: typer.Context, model: ModelName, limit: Limit = 20) -> None:
    """List the exports of a model, newest first."""
    session: Session = ctx.obj
    with session.client() as client:
        page = fetch_pages(lambda size, cursor: client.exports_page(size, cursor, model=model), limit)
    session.show(page, lambda: _listing(page.data, page.has_more))


def _listing(exports: Sequence[ExportOut], has_more: bool = False) -> RenderableType:
    rows = ((export.id, export.format, export.artifact, local_time(export.created_at)) for export in exports)
    return listing(("export", "format", "file", "created at"), rows, has_more)


@app.command()
def export(
    ctx: typer.Context,
    model: ModelName,
    format: FormatOption = "kohya",
    prompt: Annotated[str | None, typer.Option(help="Prompt of the preview. Default: one of the training")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the preview")] = None,
    follow: Follow = False,
    key: Key = None,
) -> None:
    """Export a model for other programs, then fetch it with `download`.

    A job writes the file and verifies it by reloading it and re-rendering its preview.

    Example:
      dfusion models export champion --format kohya --follow
      dfusion models download champion flowers.safetensors --format kohya
    """
    session: Session = ctx.obj
    with session.client() as client:
        options = {"prompt": prompt, "seed": seed}
        given = {name: value for name, value in options.items() if value is not None}
        job = client.start_export({"model": model, "format": format, **given}, idempotency_key=key)
        if follow:
            follow_to_end(session, client, job.id)
        else:
            session.show(job, lambda: job_sheet(job))


@app.command()
def download(
    ctx: typer.Context,
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Output file; an existing file is replaced")],
    format: FormatOption = "diffusers",
) -> None:
    """Download a model's file and verify its SHA-256. Formats other than diffusers must be exported first.

    The preview of the export and its recipe are written next to a file: adapter.preview.png and
    adapter.recipe.json. The ZIP files of peft and merged contain them.

    Example: dfusion models download mdl_… adapter.safetensors
    """
    session: Session = ctx.obj
    with session.client() as client:
        file.parent.mkdir(parents=True, exist_ok=True)
        sha256 = client.download_model(model, file, format=format)
        companions = client.download_preview(model, file, format=format)

    paths = {} if companions is None else {"preview": str(companions.preview), "recipe": str(companions.recipe)}
    result = {"model": model, "format": format, "file": str(file), "sha256": sha256, **paths}
    fields = {"file": file, "size": size(file.stat().st_size), "sha256": sha256, **paths}
    session.show(result, lambda: sheet(fields))


@app.command()
def alias(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help='The alias, such as "champion"')],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The model that the alias refers to")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias")] = False,
) -> None:
    """Set or remove an alias of a model. An alias can be used wherever a model is named.

    Examples:
      dfusion models alias champion mdl_…
      dfusion models alias champion --remove
    """
    session: Session = ctx.obj
    if remove == (model is not None):
        raise typer.BadParameter("expected a model or --remove")

    with session.client() as client:
        if model is None:
            client.remove_alias(name)
            session.show(None, lambda: Text(f"removed the alias {name}"))
            return
        details = client.set_alias(name, model)
    session.show(details, lambda: _sheet(details))


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
        "created at": local_time(model.created_at),
    }
    statistics = {name: figure(value) for name, value in model.statistics.items() if isinstance(value, int | float)}

    parts: list[RenderableType] = [sheet(fields | statistics)]
    if model.exports:
        parts += [Text(), _listing(model.exports)]
    return Group(*parts)
