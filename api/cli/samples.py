"""Samples: images with their scores, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.options import Limit, OfJob, OfPromptSet, gather
from api.cli.screens import figure, listing, moment, sheet, yes_or_no
from api.cli.session import Session
from api.client.client import SampleFilters
from api.wire.pairs import PairOut
from api.wire.samples import SampleDetail, SampleOut
from service.states import SampleRole

app = typer.Typer(no_args_is_help=True, help="Samples: list, show, save.")
Role = Annotated[SampleRole | None, typer.Option(help="Only those of this role")]
Round = Annotated[int | None, typer.Option(help="Of this round")]


@app.command("list")
def list_samples(
    ctx: typer.Context,
    job: OfJob = None,
    role: Role = None,
    round: Round = None,
    prompt_set: OfPromptSet = None,
    limit: Limit = 20,
) -> None:
    """Samples, oldest first.

    Example: dfusion samples list --job job_… --role target
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters = SampleFilters(job=job, role=role, round=round, prompt_set=prompt_set)
        found = gather(lambda size, cursor: client.samples_page(size, cursor, **filters), limit)
    headings = ("sample", "role", "round>", "seed>", "scores", "prompt")
    session.answer(found, lambda: listing(headings, (_row(sample) for sample in found.data), found.has_more))


def _row(sample: SampleOut) -> tuple[Any, ...]:
    return sample.id, sample.role, sample.round, sample.seed, _scores(sample), sample.prompt


def _scores(sample: SampleOut) -> str:
    return ", ".join(f"{score.scorer} {figure(score.value)}" for score in sample.scores)


@app.command()
def show(
    ctx: typer.Context, sample_id: Annotated[str, typer.Argument(metavar="SAMPLE", help="The sample's id")]
) -> None:
    """A sample, with the pairs that it is in."""
    session: Session = ctx.obj
    with session.client() as client:
        sample = client.sample(sample_id)
    session.answer(sample, lambda: _sheet(sample))


@app.command()
def save(
    ctx: typer.Context,
    sample_ids: Annotated[list[str] | None, typer.Argument(metavar="[SAMPLE]...", help="The samples' ids")] = None,
    to: Annotated[Path, typer.Option(help="Folder; made if it is missing")] = Path("."),
    job: OfJob = None,
    role: Role = None,
    round: Round = None,
) -> None:
    """Write images to files named by their samples' ids: some, or all of a job.

    Examples:
      dfusion samples save smp_… --to images
      dfusion samples save --job job_… --role target --to images
    """
    session: Session = ctx.obj
    if bool(sample_ids) == (job is not None):
        raise typer.BadParameter("expected ids of samples, or --job")
    with session.client() as client:
        to.mkdir(parents=True, exist_ok=True)
        chosen = [client.sample(one) for one in sample_ids or []] or client.samples(job=job, role=role, round=round)
        files = []
        for sample in chosen:
            file = to / f"{sample.id}.png"
            files.append({"sample": sample.id, "file": str(file), "sha256": client.download(sample.image, file)})
    session.answer({"data": files}, lambda: Text("\n".join(one["file"] for one in files) or "no samples"))


def _sheet(sample: SampleDetail) -> RenderableType:
    fields = {
        "sample": sample.id,
        "job": f"{sample.job}, round {sample.round}",
        "role": sample.role,
        "split": sample.split,
        "prompt": sample.prompt,
        "seed": sample.seed,
        "model": sample.model,
        "scores": _scores(sample) or None,
        "image": sample.image,
        "trajectory": sample.trajectory and f"{sample.trajectory.artifact}, row {sample.trajectory.row}",
        "made at": moment(sample.created_at),
    }
    parts: list[RenderableType] = [sheet(fields)]
    if sample.pairs:
        rows = ((pair.id, _role_in(pair, sample.id), yes_or_no(pair.adopted)) for pair in sample.pairs)
        parts += [Text(), listing(("pair", "role", "adopted"), rows)]
    return Group(*parts)


def _role_in(pair: PairOut, sample_id: str) -> str:
    sides = {"base": pair.base, "reference": pair.reference, "target": pair.target}
    return next(role for role, side in sides.items() if side is not None and side.id == sample_id)
