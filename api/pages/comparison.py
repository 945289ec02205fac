"""Two runs side by side: the settings that differ, and images of the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from api.converters.samples import sample_out
from api.pages.samples import SampleCard, sample_card
from api.wire.jobs import JobDetail
from service.db.queries import results
from service.db.tables import Sample
from service.jobs.kinds import spec_of
from service.states import SampleRole

_MOST_TWINS = 200
_ROLLOUTS = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)
_NOT_COMPARED = frozenset({"label", "preset"})
"""A preset has no effect on stored requests, which have all values."""
_LONGEST = 120
Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A setting with another value in each run; None for a run without it."""

    name: str
    values: tuple[str | None, str | None]


@dataclass(frozen=True)
class Twins:
    """The images of two runs for the same prompt and seed. The second run may have none."""

    first: SampleCard
    second: SampleCard | None


@dataclass(frozen=True)
class Images:
    """A page of images of two runs.

    Attributes:
        rounds: The round of each run that is shown.
        are_rollouts: Whether they are samples to train on, since the runs are not evaluated.
        twins: The images.
        next_cursor: The next page.
    """

    rounds: tuple[int, int]
    are_rollouts: bool
    twins: tuple[Twins, ...]
    next_cursor: str | None


def settings_of(run: JobDetail) -> dict[str, Any]:
    """The settings of a run: those that its version did not have yet by their defaults, and names with their ids.

    A name can refer to something else later: an alias to another model, a prompt set to its next version.
    """
    settings = spec_of(run.kind, run.spec).model_dump(mode="json")
    ids = {"model": run.model, "prompt_set": run.prompt_set, "held_out_prompt_set": run.held_out_prompt_set}
    for name, row_id in ids.items():
        if settings.get(name) not in (None, row_id) and row_id is not None:
            settings[name] = f"{settings[name]} ({row_id})"
    return settings


def differences(first: Spec, second: Spec) -> tuple[list[Difference], int]:
    """The settings that differ, and the number of equal ones."""
    values = [dict(leaves(spec)) for spec in (first, second)]
    names = [name for name in dict.fromkeys([*values[0], *values[1]]) if name not in _NOT_COMPARED]
    differing = [name for name in names if values[0].get(name) != values[1].get(name)]
    rows = [Difference(name, (_shown(values[0].get(name)), _shown(values[1].get(name)))) for name in differing]
    return rows, len(names) - len(differing)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a request with their values. A part that is null has no settings."""
    if not isinstance(value, Mapping):
        if value is not None:
            yield name, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{name}.{key}".lstrip("."))


def _shown(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(value)} entries)"


def images(session: Session, jobs: tuple[str, str], round_number: int | None, limit: int, cursor: str | None) -> Images:
    """Images of the first run, each with that of the second run for the same prompt and seed.

    They are those of the evaluations, or of the first round if a run is not evaluated.

    Args:
        session: A view of the database.
        jobs: The ids of the runs.
        round_number: The round; None for the last one that each run has evaluated.
        limit: The number of images of each run.
        cursor: The position in the images of the first run.
    """
    # 1. the rounds
    newest = [results.newest_round(session, job_id, SampleRole.EVALUATION) for job_id in jobs]
    are_rollouts = None in newest
    roles = _ROLLOUTS if are_rollouts else (SampleRole.EVALUATION,)
    by_default = [1 if round_ is None or are_rollouts else round_ for round_ in newest]
    rounds = (by_default[0], by_default[1]) if round_number is None else (round_number, round_number)

    # 2. the images
    page = results.sample_page(session, limit, cursor, jobs[0], roles, rounds[0])
    prompts = sorted({row.prompt for row in page.rows})
    others: list[Sample] = []
    if prompts:
        others = results.sample_page(session, _MOST_TWINS, None, jobs[1], roles, rounds[1], prompt=prompts).rows
    scores = results.scores(session, [row.id for row in [*page.rows, *others]])

    # 3. the pairs
    cards = {(row.prompt, row.seed): sample_card(sample_out(row, scores[row.id])) for row in reversed(others)}
    twins = [
        Twins(sample_card(sample_out(row, scores[row.id])), cards.get((row.prompt, row.seed))) for row in page.rows
    ]
    return Images(rounds, are_rollouts, tuple(twins), page.next_cursor)
