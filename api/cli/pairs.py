"""Commands for pairs of base, reference and target, and for reviewers' verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.jobs import follow_to_end, job_sheet
from api.cli.local import reward_agreement
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

if TYPE_CHECKING:
    from api.client.client import PairFilters
    from api.wire.pairs import AgreementOut, PairOut, VerdictOut

app = typer.Typer(no_args_is_help=True, help="Pairs: list, show, judge, export; check a reward.")
PairId = Annotated[str, typer.Argument(metavar="PAIR", help="The pair's id")]


@app.command("list")
def list_pairs(
    ctx: typer.Context,
    job: OfJob = None,
    round: Annotated[int | None, typer.Option(help="Only those of this round")] = None,
    adopted: Annotated[
        bool | None, typer.Option("--adopted/--not-adopted", help="Whether Eq. 7 adopted the target")
    ] = None,
    judged: Annotated[bool | None, typer.Option("--judged/--unjudged", help="Whether the pair has a verdict")] = None,
    judged_by_me: Annotated[
        bool | None, typer.Option("--judged-by-me/--unjudged-by-me", help="Whether it has your verdict")
    ] = None,
    reviewer: Annotated[str | None, typer.Option(help="Your name as a reviewer, if no API keys are required")] = None,
    reviewers_below: Annotated[int | None, typer.Option(help="Only those that fewer reviewers have judged")] = None,
    in_review: Annotated[
        bool | None, typer.Option("--in-review/--not-in-review", help="Whether a review of its round waits for it")
    ] = None,
    gold: Annotated[bool | None, typer.Option("--gold/--not-gold", help="Whether it is a gold pair")] = None,
    prompt_set: OfPromptSet = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    prompt: OfPrompts = None,
    scorer: OfScorer = None,
    score_min: ScoreMin = None,
    score_max: ScoreMax = None,
    limit: Limit = 20,
) -> None:
    """List pairs, oldest first.

    Example: dfusion pairs list --job job_… --unjudged
    """
    session: Session = ctx.obj
    with session.client() as client:
        filters: PairFilters = {
            "job": job,
            "round": round,
            "adopted": adopted,
            "judged": judged,
            "judged_by_me": judged_by_me,
            "reviewer": reviewer,
            "reviewers_below": reviewers_below,
            "in_review": in_review,
            "gold": gold,
            "prompt_set": prompt_set,
            "created_after": with_zone(created_after),
            "created_before": with_zone(created_before),
            "prompt": prompt,
            "scorer": scorer,
            "score_min": score_min,
            "score_max": score_max,
        }
        page = fetch_pages(lambda size, cursor: client.pairs_page(size, cursor, **filters), limit)

    headings = ("pair", "round>", "base>", "reference>", "target>", "adopted", "verdict", "prompt")
    session.show(page, lambda: listing(headings, map(_row, page.data), page.has_more))


def _row(pair: PairOut) -> tuple[Any, ...]:
    scores = (pair.base.score, pair.reference.score, pair.target.score if pair.target else None)
    verdict = pair.verdict.prefer if pair.verdict else "-"
    return pair.id, pair.round, *map(figure, scores), yes_or_no(pair.adopted), verdict, pair.prompt


@app.command()
def show(ctx: typer.Context, pair_id: PairId) -> None:
    """Show a pair: its scores, its statistics (margin, consistency, mask cover) and its verdict."""
    session: Session = ctx.obj
    with session.client() as client:
        pair = client.pair(pair_id)
    session.show(pair, lambda: _sheet(pair))


@app.command()
def verdict(
    ctx: typer.Context,
    pair_id: PairId,
    prefer: Annotated[
        Literal["target", "base", "tie", "reject", "none"],
        typer.Argument(help="target or base: the better side; tie; reject: neither is good; none: remove the verdict"),
    ],
    reviewer: Annotated[str | None, typer.Option(help="Name of the reviewer")] = None,
    revision: Annotated[
        int | None, typer.Option(help="The revision that was reviewed; the command fails if the pair has changed since")
    ] = None,
) -> None:
    """Set or remove your verdict on a pair. A job that waits for review continues after its last verdict.

    Examples:
      dfusion pairs verdict pair_… target --reviewer ann
      dfusion pairs verdict pair_… none
    """
    session: Session = ctx.obj
    with session.client() as client:
        verdict = None if prefer == "none" else prefer
        pair = client.set_verdict(pair_id, verdict, reviewer=reviewer, revision=revision)
    session.show(pair, lambda: _sheet(pair))


@app.command()
def agreement(ctx: typer.Context, job: OfJob = None, prompt_set: OfPromptSet = None) -> None:
    """Show how well reviewers agree: Krippendorff's alpha, the verdicts of each, and their accuracy on gold pairs.

    Example: dfusion pairs agreement --job job_…
    """
    session: Session = ctx.obj
    with session.client() as client:
        measured = client.agreement(job=job, prompt_set=prompt_set)
    session.show(measured, lambda: _agreement(measured))


@app.command()
def gold(
    ctx: typer.Context,
    pair_id: PairId,
    expected: Annotated[
        Literal["target", "base", "tie", "reject", "none"],
        typer.Argument(help="The verdict that reviewers should give; none: an ordinary pair"),
    ],
) -> None:
    """Make a pair a gold pair, on which the accuracy of reviewers is measured. It stays unmarked in their queues.

    Example: dfusion pairs gold pair_… target
    """
    session: Session = ctx.obj
    with session.client() as client:
        result = client.set_gold(pair_id, None if expected == "none" else expected)
    session.show(result, lambda: sheet({"pair": result.pair, "expected": result.expected}))


@app.command()
def export(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job whose pairs are exported")],
    follow: Follow = False,
    key: Key = None,
) -> None:
    """Export a job's pairs as a parquet data set. A separate job writes the file."""
    session: Session = ctx.obj
    with session.client() as client:
        export_job = client.start_export({"job": job, "format": "parquet"}, idempotency_key=key)
        if follow:
            follow_to_end(session, client, export_job.id)
        else:
            session.show(export_job, lambda: job_sheet(export_job))


@app.command()
def download(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job whose pairs were exported")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Output file (parquet)")],
) -> None:
    """Download the newest data set that `dfusion pairs export` wrote for a job."""
    session: Session = ctx.obj
    with session.client() as client:
        export = next(client.exports(job=job), None)
        if export is None:
            raise typer.BadParameter(f"{job} has no export yet; run dfusion pairs export {job} --follow")
        sha256 = client.download(export.artifact, file)
    session.show(export, lambda: Text(f"{file}, sha256 {sha256}"))


@app.command()
def check(
    ctx: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="File or folder: parquet in Pick-a-Pic's layout, or D3PO's votes")
    ],
    scorer: Annotated[str, typer.Option(help="The reward to check, by the name of a scorer")],
    samples: Annotated[Path | None, typer.Option(help="Folder with the images that D3PO's votes are about")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of pairs to read")] = None,
    device: Annotated[str, typer.Option(help="Device of the scorer's model")] = "cpu",
) -> None:
    """Check how often a reward prefers the same image of a pair as people do.

    It needs no service: the scorer runs on this machine, with the scorers of DFUSION_SCORERS.

    Examples:
      dfusion pairs check pairs.parquet --scorer shapes-clip
      dfusion pairs check votes.json --samples data --scorer shapes-clip --limit 1000
    """
    session: Session = ctx.obj
    options = {"--scorer": scorer, "--samples": samples, "--limit": limit, "--device": device}
    result = reward_agreement(source, {name: str(value) for name, value in options.items() if value is not None})
    session.show(result, lambda: _reward_agreement(result))


def _reward_agreement(result: dict[str, Any]) -> RenderableType:
    interval = " to ".join(map(figure, result["interval"] or [None]))
    facts = {
        "scorer": f"{result['scorer']}, version {result['version']}",
        "agrees": f"{result['agrees']} of {result['pairs']} pairs with a preferred image",
        "rate": None if result["rate"] is None else f"{figure(result['rate'])} ({interval})",
        "equal scores": result["equal"],
        "ties": result["ties"],
        "unlabelled": result["unlabelled"],
    }
    return sheet(facts)


def _agreement(measured: AgreementOut) -> RenderableType:
    facts = {
        "alpha": figure(measured.alpha),
        "judged": f"{measured.pairs} pairs, {measured.compared} of them by several reviewers",
    }
    rows = [
        (
            each.reviewer or "no name",
            each.judged,
            "-" if each.gold_judged is None else each.gold_judged,
            "-" if each.gold_right is None else each.gold_right,
        )
        for each in measured.reviewers
    ]
    return Group(sheet(facts), Text(), listing(("reviewer", "judged>", "gold judged>", "gold right>"), rows))


def _sheet(pair: PairOut) -> RenderableType:
    fields = {
        "pair": pair.id,
        "job": f"{pair.job}, round {pair.round}",
        "prompt": pair.prompt,
        "scorer": pair.scorer,
        "adopted": yes_or_no(pair.adopted) + (f" ({pair.reason})" if pair.reason else ""),
        "verdict": _describe_verdicts(pair),
        "revision": pair.revision,
        "thresholds": None if pair.thresholds is None else ", ".join(map(str, pair.thresholds)),
        "mask": pair.mask,
    }
    statistics = {name: figure(value) for name, value in pair.statistics.items() if value is not None}

    sides = [("base", pair.base), ("reference", pair.reference), ("target", pair.target)]
    rows = [(side.id, role, figure(side.score), side.seed, side.image) for role, side in sides if side is not None]
    table = listing(("sample", "", "score>", "seed>", "image"), rows)
    return Group(sheet(fields | statistics), Text(), table)


def _describe_verdicts(pair: PairOut) -> str | None:
    """The combined verdict, and those of several reviewers in parentheses."""
    verdict = pair.verdict
    if verdict is None:
        return None
    if len(pair.verdicts) > 1:
        given = ", ".join(f"{each.prefer}{_by(each)}" for each in pair.verdicts)
        return f"{verdict.prefer} ({given}), {local_time(verdict.created_at)}"
    return f"{verdict.prefer}{_by(verdict)}, {local_time(verdict.created_at)}"


def _by(verdict: VerdictOut) -> str:
    return f" by {verdict.reviewer}" if verdict.reviewer else ""
