"""Queries over prompt sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from sqlalchemy import Integer, Select, delete, exists, func, or_, select, tuple_, update
from sqlalchemy.orm import Session, defer

from dfusion.prompts import Prompt, PromptList
from service.db.clock import now_seconds
from service.db.queries.pages import Page, fetch_page
from service.db.queries.rows import UNSYNCED, is_any_of, is_kept, select_by_ids
from service.db.tables import Job, JobPromptSet, PromptSet
from service.errors import NotFoundError
from service.ids import IdKind, kind_of, new_id

T = TypeVar("T")


def by_id(session: Session, set_id: str) -> PromptSet | None:
    """The prompt set with this id."""
    return session.get(PromptSet, set_id)


def by_ids(session: Session, ids: Iterable[str]) -> dict[str, PromptSet]:
    """The prompt sets with these ids, by id. Unknown ids are left out."""
    return {row.id: row for row in select_by_ids(session, PromptSet, PromptSet.id, ids)}


def latest(session: Session, name: str) -> PromptSet | None:
    """The newest version of the prompt set with this name."""
    return session.scalar(_newest_first(select(PromptSet), name).limit(1))


def id_of(session: Session, name_or_id: str) -> str:
    """The id of the newest version of the prompt set with this name, or `name_or_id` itself if it is an id.

    Raises:
        NotFoundError: It is neither.
    """
    newest_id = session.scalar(_newest_first(select(PromptSet.id), name_or_id).limit(1))
    if newest_id is not None:
        return newest_id
    if kind_of(name_or_id) is not IdKind.PROMPT_SET:
        raise NotFoundError(f"expected the name or id ({IdKind.PROMPT_SET}_…) of a prompt set, got {name_or_id!r}")
    return name_or_id


def _newest_first(query: Select[T], name: str) -> Select[T]:
    """The query for the versions of the prompt set with this name, newest first."""
    return query.where(PromptSet.name == name).order_by(PromptSet.version.desc())


def page(session: Session, limit: int, cursor: str | None) -> Page[PromptSet]:
    """The newest versions of all named prompt sets, by id, without their prompts."""
    versions = select(PromptSet.name, func.max(PromptSet.version)).where(PromptSet.name.is_not(None))
    newest = versions.group_by(PromptSet.name)
    query = select(PromptSet).options(defer(PromptSet.prompts))
    query = query.where(tuple_(PromptSet.name, PromptSet.version).in_(newest))
    return fetch_page(session, query, PromptSet.id, limit, cursor)


def unsaved(
    prompts: Sequence[Prompt],
    name: str | None = None,
    description: str = "",
    builtin: bool = False,
    version: int = 1,
) -> PromptSet:
    """A new prompt set that is not in the database yet. Without a name it belongs to one job."""
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
    """Insert a prompt set."""
    session.add(row)
    session.flush()
    return row


def lock(session: Session, name_or_id: str) -> list[PromptSet]:
    """Lock the versions of the prompt set with this name, or the one with this id, without reading their prompts.

    Until the transaction ends, no job that uses them can be created.
    """
    for is_meant in (PromptSet.name == name_or_id, PromptSet.id == name_or_id):
        query = select(PromptSet).options(defer(PromptSet.prompts)).where(is_meant)
        versions = list(session.scalars(query.order_by(PromptSet.id).with_for_update()))
        if versions:
            return versions
    return []


def users(session: Session, ids: Collection[str], limit: int) -> list[str]:
    """The first jobs that use these prompt sets, without deleted ones."""
    used = select(JobPromptSet.job_id).where(is_any_of(JobPromptSet.prompt_set_id, ids))
    return list(session.scalars(select(Job.id).where(Job.id.in_(used), is_kept(Job)).order_by(Job.id).limit(limit)))


def any_named(session: Session, ids: Collection[str]) -> bool:
    """Whether one of these prompt sets has a name."""
    named = select(PromptSet.id).where(is_any_of(PromptSet.id, ids), PromptSet.name.is_not(None))
    return session.scalar(named.limit(1)) is not None


def forget_names(session: Session, ids: Collection[str]) -> None:
    """Remove the names of prompt sets, which are then removed as soon as no job refers to them."""
    session.execute(update(PromptSet).where(is_any_of(PromptSet.id, ids)).values(name=None), execution_options=UNSYNCED)


def remove_unused(session: Session, ids: Collection[str]) -> None:
    """Remove those of these prompt sets that have no name and that no job refers to, not even a deleted one."""
    # locked before the check, so that it sees the jobs that use them by now
    locked = select(PromptSet.id).where(is_any_of(PromptSet.id, ids), PromptSet.name.is_(None))
    unnamed = list(session.scalars(locked.order_by(PromptSet.id).with_for_update()))
    is_used = or_(
        exists().where(JobPromptSet.prompt_set_id == PromptSet.id),
        exists().where(Job.prompt_set_id == PromptSet.id),  # a job that an older process has created
        exists().where(Job.held_out_prompt_set_id == PromptSet.id),
    )
    query = delete(PromptSet).where(is_any_of(PromptSet.id, unnamed), ~is_used)
    session.execute(query, execution_options=UNSYNCED)


def holds(row: PromptSet, prompts: Sequence[Prompt]) -> bool:
    """Whether the prompt set has exactly these prompts."""
    return row.sha256 == _sha256([prompt.model_dump(mode="json") for prompt in prompts])


def ensure_builtin(session: Session, lists: Iterable[PromptList]) -> None:
    """Insert missing built-in lists, and new versions of those whose prompts have changed."""
    by_name = {prompt_list.name: prompt_list for prompt_list in lists}
    query = select(PromptSet).options(defer(PromptSet.prompts)).where(is_any_of(PromptSet.name, by_name))
    newest = {row.name: row for row in session.scalars(query.order_by(PromptSet.version))}

    # one statement for all of them: each start of a program does this
    for name, prompt_list in by_name.items():
        row = newest.get(name)
        if row is None:
            session.add(unsaved(prompt_list.prompts, name, prompt_list.description, builtin=True))
        elif row.builtin and not holds(row, prompt_list.prompts):
            session.add(unsaved(prompt_list.prompts, name, prompt_list.description, True, row.version + 1))
    session.flush()


def size(session: Session, set_id: str) -> int:
    """The number of prompts of the set, which are not read."""
    query = select(func.json_array_length(PromptSet.prompts, type_=Integer())).where(PromptSet.id == set_id)
    return session.scalars(query).one()


def sizes(session: Session, set_ids: Iterable[str]) -> dict[str, int]:
    """The numbers of prompts of these sets, by id. The prompts are not read."""
    size_of_set = func.json_array_length(PromptSet.prompts, type_=Integer()).label("size")
    rows = session.execute(select(PromptSet.id, size_of_set).where(is_any_of(PromptSet.id, set_ids)))
    return {row.id: row.size for row in rows}


def names(session: Session, set_ids: Iterable[str]) -> dict[str, str | None]:
    """The names of these sets, by id; None for the prompts of one job. The prompts are not read."""
    rows = session.execute(select(PromptSet.id, PromptSet.name).where(is_any_of(PromptSet.id, set_ids)))
    return {row.id: row.name for row in rows}


def items_of(session: Session, set_id: str, index: int) -> list[str]:
    """The items of one prompt of the set; none if it has no such prompt. The other prompts are not read."""
    prompt = session.scalar(select(PromptSet.prompts[index]).where(PromptSet.id == set_id))
    return [] if prompt is None else list(prompt["items"])


def prompts_of(row: PromptSet) -> tuple[Prompt, ...]:
    """The prompts of the set, validated again."""
    return tuple(Prompt.model_validate(prompt) for prompt in row.prompts)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
