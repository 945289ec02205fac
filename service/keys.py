"""API keys and their scopes. The database keeps only the SHA-256 of a key; the key is shown once, at creation."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from service.db.queries import api_keys, jobs
from service.db.queries.api_keys import Candidate
from service.db.tables import ApiKey
from service.db.unit_of_work import UnitOfWork
from service.errors import ConflictError, InvalidRequestError, StartError
from service.settings import Settings
from service.states import KeyScope

BOOTSTRAP = "bootstrap"
"""The name of the key in the settings. No other key can have it."""
_PREFIX_LENGTH = 12
_RANDOM_BYTES = 38
"""304 bits, of which the visible prefix reveals 48: 256 remain secret."""
_TOKEN = re.compile(r"dfk_[A-Za-z0-9_-]{32,200}")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """The caller of a request: its API key, the scopes that the key grants, and the key's name."""

    key_id: str | None
    scopes: frozenset[KeyScope]
    name: str | None = None


ANYONE = Caller(None, frozenset(KeyScope))
"""The caller of every request if no keys are required."""


def token_hash(token: str) -> str:
    """The stored hash of a key. One round of SHA-256 is enough, since 256 random bits cannot be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


def create(session: Session, name: str, scopes: frozenset[KeyScope], expires_at: float | None) -> tuple[ApiKey, str]:
    """Create a key.

    Returns:
        The row, and the key itself, which is stored nowhere.

    Raises:
        InvalidRequestError: The name is reserved, or the expiry is in the past.
    """
    if name == BOOTSTRAP:
        raise InvalidRequestError.at("/name", f"expected a name other than {BOOTSTRAP!r}, which is reserved")
    if expires_at is not None and expires_at <= jobs.now(session):
        raise InvalidRequestError.at("/expires_at", "expected a time in the future")

    token = f"dfk_{secrets.token_urlsafe(_RANDOM_BYTES)}"
    return _add(session, name, token, scopes, expires_at), token


def _add(session: Session, name: str, token: str, scopes: frozenset[KeyScope], expires_at: float | None) -> ApiKey:
    return api_keys.add(
        session,
        name=name,
        prefix=token[:_PREFIX_LENGTH],
        sha256=token_hash(token),
        scopes=sorted(scopes),
        expires_at=expires_at,
    )


def revoke(session: Session, key_id: str, keep_an_admin: bool) -> None:
    """Revoke a key.

    Raises:
        NotFoundError: No such key exists.
        ConflictError: `keep_an_admin` is set and this is the last active key with the scope admin.
    """
    row = api_keys.get(session, key_id)
    if keep_an_admin and [key.id for key in api_keys.active(session, KeyScope.ADMIN)] == [row.id]:
        raise ConflictError("this is the last key with the scope admin: create another one first")
    api_keys.revoke(session, row.id)


def authenticate(uow: UnitOfWork, token: str) -> Caller | None:
    """The caller with this key. None if the key is unknown, expired or revoked."""
    if not _TOKEN.fullmatch(token):
        return None

    digest = token_hash(token)
    with uow.reading() as session:
        candidates = api_keys.candidates(session, token[:_PREFIX_LENGTH])
    key = next((candidate for candidate in candidates if hmac.compare_digest(candidate.sha256, digest)), None)
    return None if key is None else caller_of(uow, key)


def caller_of(uow: UnitOfWork, key: Candidate) -> Caller:
    """The caller with this active key, whose use is recorded if that is due."""
    if key.use_is_due:
        _record_use(uow, key.id)
    granted = (KeyScope(scope).includes for scope in key.scopes)
    return Caller(key.id, frozenset[KeyScope]().union(*granted), key.name)


def is_active(uow: UnitOfWork, key_id: str) -> bool:
    """Whether the key is neither revoked nor expired."""
    with uow.reading() as session:
        return api_keys.is_active(session, key_id)


def _record_use(uow: UnitOfWork, key_id: str) -> None:
    try:
        with uow.writing() as session:
            api_keys.record_use(session, key_id)
    except OperationalError:
        _logger.warning("cannot record the use of %s: the database is unavailable", key_id)


def prepare(uow: UnitOfWork, settings: Settings) -> None:
    """Add the bootstrap key of the settings, and revoke earlier ones.

    Raises:
        StartError: The key is malformed, or keys are required and none has the scope admin.
    """
    token = settings.bootstrap_admin_key.get_secret_value()
    if token and not _TOKEN.fullmatch(token):
        raise StartError(
            "DFUSION_BOOTSTRAP_ADMIN_KEY: expected dfk_ and then 32 to 200 letters, digits, '-' or '_'; "
            'for example "dfk_$(openssl rand -hex 32)"'
        )

    try:
        _prepare(uow, settings.auth, token)
    except IntegrityError:  # another process of this installation added the key concurrently
        _prepare(uow, settings.auth, token)


def _prepare(uow: UnitOfWork, auth: bool, token: str) -> None:
    digest = token_hash(token) if token else ""
    with uow.writing() as session:
        bootstrap_keys = api_keys.named(session, BOOTSTRAP)
        for row in bootstrap_keys:
            if row.sha256 != digest:
                api_keys.revoke(session, row.id)

        if token and digest not in {row.sha256 for row in bootstrap_keys}:
            _add(session, BOOTSTRAP, token, frozenset({KeyScope.ADMIN}), None)

        if auth and not api_keys.active(session, KeyScope.ADMIN):
            raise StartError(
                "DFUSION_AUTH is on but no key has the scope admin: set DFUSION_BOOTSTRAP_ADMIN_KEY to a key that was "
                "not revoked"
            )
