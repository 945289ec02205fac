"""Commands for samples: images, their scores and their files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.jobs import follow_to_end, job_sheet
from api.cli.options import (
    CreatedAfter,
    CreatedBefore,
    Follow,
    Key,
    Limit,
    OfJob,
    OfPrompts,
    OfPromptSet,
    OfScorer,
    ScoreMax,
    ScoreMin,
    fetch_pages,
    with_zone,
)
from api.cli.screens import figure, listing, local_time, sheet, yes_or_no
from api.cli.session import Session
from service.states import SampleRole

if TYPE_CHECKING:
    from api.client.client import SampleFilters
    from api.wire.pairs import PairOut
    from api.wire.samples import PreviewOut, SampleDetail, SampleOut

app = typer.Typer(no_args_is_help=True, help="Samples: list, show, save.")
Role = Annotated[list[SampleRole] | None, typer.Option(help="Only those with this role; can be repeated")]
Round = Annotated[int | None, typer.Option(help="Only those of this round")]


@app.command("list")
def list_samples(
    ctx: typer.Context,
    job: OfJob = None,
    role: Role = None,
    round: Round = None,
    prompt_set: OfPromptSet = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    prompt: OfPrompts = None,
    scorer: OfScorer = None,
    score_min: ScoreMin = None,
    score_max: ScoreMax = None,
    limit: Limit = 20,
) -> None:
    """List samples, oldest first.

    Examples:
      dfusion samples list --job job_… --role base --role reference
      dfusion samples list --prompt "a red circle" --scorer shapes-judge --score-min 0.9
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters: SampleFilters = {
            "job": job,
            "role": role,
            "round": round,
            "prompt_set": prompt_set,
            "created_after": with_zone(created_after),
            "created_before": with_zone(created_before),
            "prompt": prompt,
            "scorer": scorer,
            "score_min": score_min,
            "score_max": score_max,
        }
        page = fetch_pages(lambda size, cursor: client.samples_page(size, cursor, **filters), limit)

    headings = ("sample", "role", "round>", "seed>", "scores", "prompt")
    session.show(page, lambda: listing(headings, map(_row, page.data), page.has_more))


def _row(sample: SampleOut) -> tuple[Any, ...]:
    return sample.id, sample.role, sample.round, sample.seed, _scores(sample), sample.prompt


def _scores(sample: SampleOut) -> str:
    return ", ".join(f"{score.scorer} {figure(score.value)}" for score in sample.scores)


@app.command()
def show(
    ctx: typer.Context, sample_id: Annotated[str, typer.Argument(metavar="SAMPLE", help="The sample's id")]
) -> None:
    """Show a sample and the pairs that contain it."""
    session: Session = ctx.obj
    with session.client() as client:
        sample = client.sample(sample_id)
    session.show(sample, lambda: _sheet(sample))


@app.command()
def preview(
    ctx: typer.Context,
    sample_ids: Annotated[list[str], typer.Argument(metavar="SAMPLE...", help="The samples' ids, at most 16")],
    follow: Follow = False,
    key: Key = None,
) -> None:
    """Make small images of how samples were denoised, and of the masks of references.

    Examples:
      dfusion samples preview smp_… --follow
    """
    session: Session = ctx.obj
    with session.client() as client:
        job = client.start_preview({"samples": sample_ids}, idempotency_key=key)
        if follow:
            follow_to_end(session, client, job.id)
        else:
            session.show(job, lambda: job_sheet(job))


@app.command()
def save(
    ctx: typer.Context,
    sample_ids: Annotated[list[str] | None, typer.Argument(metavar="[SAMPLE]...", help="The samples' ids")] = None,
    to: Annotated[Path, typer.Option(help="Output folder; created if it does not exist")] = Path("."),
    job: OfJob = None,
    role: Role = None,
    round: Round = None,
) -> None:
    """Download the images of samples, or of all samples of a job, to files named by sample id.

    Examples:
      dfusion samples save smp_… --to images
      dfusion samples save --job job_… --role target --to images
    """
    session: Session = ctx.obj
    if bool(sample_ids) == (job is not None):
        raise typer.BadParameter("expected ids of samples or --job")

    with session.client() as client:
        to.mkdir(parents=True, exist_ok=True)
        samples: Iterable[SampleOut]
        if sample_ids:
            samples = [client.sample(sample_id) for sample_id in sample_ids]
        else:
            samples = client.samples(job=job, role=role, round=round)

        files = []
        for sample in samples:
            file = to / f"{sample.id}.png"
            files.append({"sample": sample.id, "file": str(file), "sha256": client.download(sample.image, file)})

    session.show({"data": files}, lambda: Text("\n".join(entry["file"] for entry in files) or "no samples"))


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
        "previews": sample.previews and _preview(sample.previews),
        "trajectory": sample.trajectory and f"{sample.trajectory.artifact}, row {sample.trajectory.row}",
        "created at": local_time(sample.created_at),
    }

    parts: list[RenderableType] = [sheet(fields)]
    if sample.pairs:
        rows = ((pair.id, _role_in(pair, sample.id), yes_or_no(pair.adopted)) for pair in sample.pairs)
        parts += [Text(), listing(("pair", "role", "adopted"), rows)]
    return Group(*parts)


def _preview(preview: PreviewOut) -> str:
    mask = "" if preview.mask is None else f", masks {preview.mask.image}"
    return f"{preview.strip}: {len(preview.steps)} of {preview.num_steps + 1} states{mask}"


def _role_in(pair: PairOut, sample_id: str) -> str:
    sides = {"base": pair.base, "reference": pair.reference, "target": pair.target}
    return next(role for role, side in sides.items() if side is not None and side.id == sample_id)
