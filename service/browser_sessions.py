"""Sessions of browsers, which sign in with an API key once. The database keeps only the SHA-256 of a session's token.

All API processes accept a session, since it is a row. It has the scopes of its key and ends with it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from service import keys
from service.db.queries import browser_sessions
from service.db.unit_of_work import UnitOfWork
from service.keys import Caller

LIFETIME_SECONDS = 7 * 24 * 3600
_RANDOM_BYTES = 32
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


def sign_in(uow: UnitOfWork, key: str) -> str | None:
    """Start a session with an API key. Returns its token, or None if the key is unknown, expired or revoked."""
    caller = keys.authenticate(uow, key)
    if caller is None or caller.key_id is None:
        return None

    token = secrets.token_urlsafe(_RANDOM_BYTES)
    with uow.writing() as session:
        browser_sessions.add(session, keys.token_hash(token), caller.key_id, LIFETIME_SECONDS)
    return token


def authenticate(uow: UnitOfWork, token: str) -> Caller | None:
    """The caller with this session. None if it is unknown or has ended."""
    if not _TOKEN.fullmatch(token):
        return None
    with uow.reading() as session:
        key = browser_sessions.key_of(session, keys.token_hash(token))
    return None if key is None else keys.caller_of(uow, key)


def sign_out(uow: UnitOfWork, token: str) -> None:
    """End a session."""
    with uow.writing() as session:
        browser_sessions.remove(session, keys.token_hash(token))


def csrf_token(token: str) -> str:
    """The value that requests of the session's own pages repeat. It is computed, not stored."""
    return hmac.new(token.encode(), b"csrf", hashlib.sha256).hexdigest()


def is_csrf_token(token: str, given: str) -> bool:
    """Whether `given` is the value that pages of this session repeat."""
    return hmac.compare_digest(csrf_token(token).encode(), given.encode())
