"""Options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from api.wire.common import ListOut


T = TypeVar("T")

Spec = Annotated[
    Path | None, typer.Option("--spec", metavar="FILE", help="JSON file with the request body; - is standard input")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the request, such as training.beta=0.5"),
]
Label = Annotated[str | None, typer.Option(help="Free text")]
Priority = Annotated[
    int | None, typer.Option(help="From -100 to 100; higher runs before other jobs of the same API key. Default 0")
]
Seed = Annotated[int | None, typer.Option(help="Random seed")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the job ends")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the request and estimate its cost")]
Key = Annotated[
    str | None, typer.Option("--key", help="Idempotency-Key: repeating the request with this key creates no second job")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", help='A prompt with its items in brackets: "a \\[cat] eating a \\[sandwich]"'
    ),
]
OfJob = Annotated[str | None, typer.Option("--job", metavar="JOB", help="Only those of this job")]
OfPromptSet = Annotated[
    str | None, typer.Option("--prompt-set", metavar="SET", help="Only those on this prompt set (name or id)")
]
CreatedAfter = Annotated[datetime | None, typer.Option(help="Only those created at this local time or later")]
CreatedBefore = Annotated[datetime | None, typer.Option(help="Only those created before this local time")]
OfPrompts = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Only those of this prompt; can be repeated")
]
OfScorer = Annotated[str | None, typer.Option("--scorer", metavar="SCORER", help="Only those scored by this scorer")]
ScoreMin = Annotated[float | None, typer.Option(help="Lowest score by --scorer; of pairs, of the target")]
ScoreMax = Annotated[float | None, typer.Option(help="Highest score by --scorer; of pairs, of the target")]
Limit = Annotated[int, typer.Option(min=1, help="Maximum number of entries")]

MAX_PAGE_SIZE = 200


def fetch_pages(fetch: Callable[[int, str | None], ListOut[T]], limit: int) -> ListOut[T]:
    """Fetch the first `limit` entries of a list.

    Args:
        fetch: Returns one page, given its size and the cursor of the page before.
        limit: Maximum number of entries.

    Returns:
        The entries of all pages as one page.
    """
    result = fetch(min(limit, MAX_PAGE_SIZE), None)
    while result.has_more and len(result.data) < limit:
        page = fetch(min(limit - len(result.data), MAX_PAGE_SIZE), result.next_cursor)
        data = [*result.data, *page.data]
        result = type(result)(data=data, has_more=page.has_more, next_cursor=page.next_cursor)
    return result


def with_zone(time: datetime | None) -> datetime | None:
    """Add this machine's time zone to a local time."""
    return None if time is None else time.astimezone()


def prompt_bodies(prompts: list[str] | None) -> list[dict[str, str]] | None:
    """Convert prompts to the request's form; the service detects their items."""
    return [{"text": prompt} for prompt in prompts] if prompts else None
