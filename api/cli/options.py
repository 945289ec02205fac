"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from api.wire.common import ListOut

T = TypeVar("T")

Spec = Annotated[
    Path | None, typer.Option("--spec", metavar="FILE", help="JSON body to start from; - is standard input")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the request, such as training.beta=0.5"),
]
Label = Annotated[str | None, typer.Option(help="Free text")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the job has ended")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the request and say what it would take")]
Key = Annotated[str | None, typer.Option("--key", help="Idempotency-Key: the same key makes the job only once")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help='A prompt, items in brackets: "a \\[cat] eating a \\[sandwich]"'),
]
OfJob = Annotated[str | None, typer.Option("--job", metavar="JOB", help="Of this job")]
OfPromptSet = Annotated[
    str | None, typer.Option("--prompt-set", metavar="SET", help="On this prompt set, by its name or id")
]
Limit = Annotated[int, typer.Option(min=1, help="How many at most")]

LONGEST_PAGE = 200


def gather(page: Callable[[int, str | None], ListOut[T]], limit: int) -> ListOut[T]:
    """The first `limit` of a list, of as many pages as that takes."""
    found = page(min(limit, LONGEST_PAGE), None)
    while found.has_more and len(found.data) < limit:
        more = page(min(limit - len(found.data), LONGEST_PAGE), found.next_cursor)
        found = type(found)(data=[*found.data, *more.data], has_more=more.has_more, next_cursor=more.next_cursor)
    return found


def texts(prompts: list[str] | None) -> list[dict[str, str]] | None:
    """Prompts as a request has them; the service finds the items."""
    return [{"text": prompt} for prompt in prompts] if prompts else None
