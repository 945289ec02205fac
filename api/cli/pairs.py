"""Pairs: base, reference and target side by side, and people's verdicts on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.jobs import followed, job_sheet
from api.cli.options import Follow, Key, Limit, OfJob, OfPromptSet, gather
from api.cli.screens import figure, listing, moment, sheet, yes_or_no
from api.cli.session import Session
from api.client.client import PairFilters
from api.wire.pairs import PairOut

app = typer.Typer(no_args_is_help=True, help="Pairs: list, show, judge, export.")
PairId = Annotated[str, typer.Argument(metavar="PAIR", help="The pair's id")]


@app.command("list")
def list_pairs(
    ctx: typer.Context,
    job: OfJob = None,
    round: Annotated[int | None, typer.Option(help="Of this round")] = None,
    adopted: Annotated[
        bool | None, typer.Option("--adopted/--not-adopted", help="Whether Eq. 7 adopted the target")
    ] = None,
    judged: Annotated[
        bool | None, typer.Option("--judged/--unjudged", help="Whether a person has given a verdict")
    ] = None,
    prompt_set: OfPromptSet = None,
    limit: Limit = 20,
) -> None:
    """Pairs, oldest first.

    Example: dfusion pairs list --job job_… --unjudged
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters = PairFilters(job=job, round=round, adopted=adopted, judged=judged, prompt_set=prompt_set)
        found = gather(lambda size, cursor: client.pairs_page(size, cursor, **filters), limit)
    headings = ("pair", "round>", "base>", "reference>", "target>", "adopted", "verdict", "prompt")
    session.answer(found, lambda: listing(headings, (_row(pair) for pair in found.data), found.has_more))


def _row(pair: PairOut) -> tuple[Any, ...]:
    scores = (pair.base.score, pair.reference.score, pair.target.score if pair.target else None)
    verdict = pair.verdict.prefer if pair.verdict else "-"
    return pair.id, pair.round, *map(figure, scores), yes_or_no(pair.adopted), verdict, pair.prompt


@app.command()
def show(ctx: typer.Context, pair_id: PairId) -> None:
    """A pair: scores, figures (margin, consistency, mask cover) and verdict."""
    session: Session = ctx.obj
    with session.client() as client:
        pair = client.pair(pair_id)
    session.answer(pair, lambda: _sheet(pair))


@app.command()
def verdict(
    ctx: typer.Context,
    pair_id: PairId,
    prefer: Annotated[
        Literal["target", "base", "tie", "reject", "none"],
        typer.Argument(help="The better side; tie; reject: neither is good; none: take a verdict back"),
    ],
    reviewer: Annotated[str | None, typer.Option(help="Who says so")] = None,
    revision: Annotated[
        int | None, typer.Option(help="The pair's revision that was looked at: fails if it has changed since")
    ] = None,
) -> None:
    """Say which side of a pair is better. The last verdict that a review waits for lets its job go on.

    Examples:
      dfusion pairs verdict pair_… target --reviewer ann
      dfusion pairs verdict pair_… none
    """
    session: Session = ctx.obj
    with session.client() as client:
        said = None if prefer == "none" else prefer
        pair = client.set_verdict(pair_id, said, reviewer=reviewer, revision=revision)
    session.answer(pair, lambda: _sheet(pair))


@app.command()
def export(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job whose pairs they are")],
    follow: Follow = False,
    key: Key = None,
) -> None:
    """Write a job's pairs as a parquet data set, by a job of its own."""
    session: Session = ctx.obj
    with session.client() as client:
        made = client.start_export({"job": job, "format": "parquet"}, idempotency_key=key)
        if follow:
            followed(session, client, made.id)
        else:
            session.answer(made, lambda: job_sheet(made))


@app.command()
def download(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job whose pairs were exported")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the parquet file")],
) -> None:
    """Fetch the newest data set that `dfusion pairs export` made of a job's pairs."""
    session: Session = ctx.obj
    with session.client() as client:
        made = client.exports(job).data
        if not made:
            raise typer.BadParameter(f"{job} has no export yet: dfusion pairs export {job} --follow")
        sha256 = client.download(made[0].artifact, file)
    session.answer(made[0], lambda: Text(f"{file}, sha256 {sha256}"))


def _sheet(pair: PairOut) -> RenderableType:
    said = None
    if pair.verdict is not None:
        by = f" by {pair.verdict.reviewer}" if pair.verdict.reviewer else ""
        said = f"{pair.verdict.prefer}{by}, {moment(pair.verdict.at)}"
    fields = {
        "pair": pair.id,
        "job": f"{pair.job}, round {pair.round}",
        "prompt": pair.prompt,
        "scorer": pair.scorer,
        "adopted": yes_or_no(pair.adopted) + (f" ({pair.why})" if pair.why else ""),
        "verdict": said,
        "revision": pair.revision,
        "thresholds": None if pair.thresholds is None else ", ".join(map(str, pair.thresholds)),
        "mask": pair.mask,
    }
    figures = {name: figure(value) for name, value in pair.figures.items() if value is not None}
    sides = [("base", pair.base), ("reference", pair.reference), ("target", pair.target)]
    rows = [(side.id, role, figure(side.score), side.seed, side.image) for role, side in sides if side is not None]
    table = listing(("sample", "", "score>", "seed>", "image"), rows)
    return Group(sheet(fields | figures), Text(), table)
