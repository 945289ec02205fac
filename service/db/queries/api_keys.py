"""Queries over API keys. Rows are never deleted, since jobs reference the key that created them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, or_, select, update
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries.pages import Page, fetch_page
from service.db.queries.rows import get_row
from service.db.tables import ApiKey
from service.ids import IdKind, new_id

_USE_INTERVAL_SECONDS = 300.0
# built once, since every request with a key runs it and building it takes about as long as running it
USE_IS_DUE = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now_seconds() - _USE_INTERVAL_SECONDS)
IS_ACTIVE = ApiKey.revoked_at.is_(None) & or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now_seconds())
_CANDIDATES = select(ApiKey.id, ApiKey.name, ApiKey.sha256, ApiKey.scopes, USE_IS_DUE).where(
    ApiKey.prefix == bindparam("prefix"), IS_ACTIVE
)


@dataclass(frozen=True)
class Candidate:
    """An active key with the requested prefix. `use_is_due`: the time of its last use is to be updated."""

    id: str
    name: str
    sha256: str
    scopes: list[str]
    use_is_due: bool


def add(
    session: Session, *, name: str, prefix: str, sha256: str, scopes: list[str], expires_at: float | None
) -> ApiKey:
    """Insert a key."""
    row = ApiKey(
        id=new_id(IdKind.API_KEY),
        name=name,
        prefix=prefix,
        sha256=sha256,
        scopes=scopes,
        expires_at=expires_at,
        created_at=now_seconds(),
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, key_id: str) -> ApiKey:
    """The key. Raises NotFoundError."""
    return get_row(session, ApiKey, IdKind.API_KEY, key_id)


def page(session: Session, limit: int, cursor: str | None) -> Page[ApiKey]:
    """Keys, newest first."""
    return fetch_page(session, select(ApiKey), ApiKey.id, limit, cursor, newest_first=True)


def named(session: Session, name: str) -> list[ApiKey]:
    """All keys with this name, including revoked ones."""
    return list(session.scalars(select(ApiKey).where(ApiKey.name == name)))


def active(session: Session, scope: str) -> list[ApiKey]:
    """Keys with exactly this scope that are neither revoked nor expired."""
    return [row for row in session.scalars(select(ApiKey).where(IS_ACTIVE)) if scope in row.scopes]


def is_active(session: Session, key_id: str) -> bool:
    """Whether the key is neither revoked nor expired."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, IS_ACTIVE)) is not None


def candidates(session: Session, prefix: str) -> list[Candidate]:
    """Active keys with this prefix."""
    rows = session.execute(_CANDIDATES, {"prefix": prefix})
    return [Candidate(row[0], row[1], row[2], row[3], bool(row[4])) for row in rows]


def record_use(session: Session, key_id: str) -> None:
    """Set the time of the key's last use to now."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now_seconds()))


def revoke(session: Session, key_id: str) -> None:
    """Revoke the key. A key that was revoked before keeps its time."""
    query = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    session.execute(query.values(revoked_at=now_seconds()))
