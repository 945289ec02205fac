"""Queries over prompt sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from dfusion.prompts import Prompt, PromptList
from service.db.clock import now_seconds
from service.db.queries.pages import Page, fetch_page
from service.db.tables import PromptSet
from service.errors import NotFoundError
from service.ids import IdKind, kind_of, new_id


def by_id(session: Session, set_id: str) -> PromptSet | None:
    return session.get(PromptSet, set_id)


def latest(session: Session, name: str) -> PromptSet | None:
    """The newest version of the set of that name."""
    query = select(PromptSet).where(PromptSet.name == name).order_by(PromptSet.version.desc()).limit(1)
    return session.scalar(query)


def id_of(session: Session, name_or_id: str) -> str:
    """The id of the newest version of the set of that name, or the id itself. Raises NotFoundError for neither."""
    named = latest(session, name_or_id)
    if named is not None:
        return named.id
    if kind_of(name_or_id) is not IdKind.PROMPT_SET:
        raise NotFoundError(f"{name_or_id!r} is no prompt set's name, and no id of one ({IdKind.PROMPT_SET}_…)")
    return name_or_id


def page(session: Session, limit: int, cursor: str | None) -> Page[PromptSet]:
    """Named sets, in their newest versions, by id."""
    named = select(PromptSet.name, func.max(PromptSet.version)).where(PromptSet.name.is_not(None))
    query = select(PromptSet).where(tuple_(PromptSet.name, PromptSet.version).in_(named.group_by(PromptSet.name)))
    return fetch_page(session, query, PromptSet.id, limit, cursor)


def unsaved(
    prompts: Sequence[Prompt],
    name: str | None = None,
    description: str = "",
    builtin: bool = False,
    version: int = 1,
) -> PromptSet:
    """A new set that is not in the database yet; without a name it belongs to the job that it came with."""
    content = [prompt.model_dump(mode="json") for prompt in prompts]
    return PromptSet(
        id=new_id(IdKind.PROMPT_SET),
        name=name,
        version=version,
        description=description,
        builtin=builtin,
        prompts=content,
        sha256=_sha256(content),
        created_at=now_seconds(),
    )


def add(session: Session, row: PromptSet) -> PromptSet:
    """Insert a set."""
    session.add(row)
    session.flush()
    return row


def holds(row: PromptSet, prompts: Sequence[Prompt]) -> bool:
    """Whether these are the set's prompts."""
    return row.sha256 == _sha256([prompt.model_dump(mode="json") for prompt in prompts])


def ensure_builtin(session: Session, lists: Iterable[PromptList]) -> None:
    """Add the built-in lists that are not there yet, or whose prompts have changed (as a new version)."""
    for item in lists:
        known = latest(session, item.name)
        if known is None:
            add(session, unsaved(item.prompts, item.name, item.description, builtin=True))
        elif known.builtin and not holds(known, item.prompts):
            add(session, unsaved(item.prompts, item.name, item.description, True, known.version + 1))


def size(session: Session, set_id: str) -> int:
    """How many prompts the set has."""
    return len(session.get_one(PromptSet, set_id).prompts)


def prompts_of(row: PromptSet) -> tuple[Prompt, ...]:
    """The set's prompts, checked again."""
    return tuple(Prompt.model_validate(prompt) for prompt in row.prompts)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
