"""Queries over the sessions of browsers. A session is valid while its API key is."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, select
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries.api_keys import IS_ACTIVE, USE_IS_DUE, Candidate
from service.db.queries.rows import UNSYNCED
from service.db.tables import ApiKey, BrowserSession

_EXPIRED_PER_SIGN_IN = 100
# built once, since every request of a browser runs it and building it takes about as long as running it
_KEY = (
    select(ApiKey.id, ApiKey.name, ApiKey.sha256, ApiKey.scopes, USE_IS_DUE)
    .join(BrowserSession, BrowserSession.api_key_id == ApiKey.id)
    .where(BrowserSession.sha256 == bindparam("sha256"), BrowserSession.expires_at > now_seconds(), IS_ACTIVE)
)


def add(session: Session, sha256: str, api_key_id: str, seconds: float) -> None:
    """Insert a session that ends after `seconds`, and remove expired ones, a bounded number."""
    expired = select(BrowserSession.sha256).where(BrowserSession.expires_at <= now_seconds())
    removed = delete(BrowserSession).where(BrowserSession.sha256.in_(expired.limit(_EXPIRED_PER_SIGN_IN)))
    session.execute(removed, execution_options=UNSYNCED)

    row = BrowserSession(
        sha256=sha256, api_key_id=api_key_id, created_at=now_seconds(), expires_at=now_seconds() + seconds
    )
    session.add(row)
    session.flush()


def key_of(session: Session, sha256: str) -> Candidate | None:
    """The API key of a session. None if the session has ended, or the key is revoked or expired."""
    row = session.execute(_KEY, {"sha256": sha256}).one_or_none()
    return None if row is None else Candidate(row[0], row[1], row[2], row[3], bool(row[4]))


def remove(session: Session, sha256: str) -> None:
    """End the session. Does nothing if it does not exist."""
    session.execute(delete(BrowserSession).where(BrowserSession.sha256 == sha256), execution_options=UNSYNCED)
