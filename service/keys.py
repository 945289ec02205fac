"""API keys: who may do what. Only a key's SHA-256 is kept; the key itself is shown once, when it is made."""

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
from service.db.tables import ApiKey
from service.db.unit_of_work import UnitOfWork
from service.errors import ConflictError, InvalidRequestError, StartError
from service.settings import Settings
from service.states import KeyScope

BOOTSTRAP = "bootstrap"
"""The name of the key that the settings give; no other may have it."""
_PREFIX_LENGTH = 12
_RANDOM_BYTES = 38
"""304 bits, of which the shown prefix tells 48: 256 are left to guess."""
_TOKEN = re.compile(r"dfk_[A-Za-z0-9_-]{32,200}")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Whom a request comes from: a key and all that its scopes include."""

    key_id: str | None
    scopes: frozenset[KeyScope]


ANYONE = Caller(None, frozenset(KeyScope))
"""The caller where no keys are asked for."""


def token_hash(token: str) -> str:
    """What is kept of a key. One round is enough: nobody can try 2^256 keys, as they can passwords."""
    return hashlib.sha256(token.encode()).hexdigest()


def create(session: Session, name: str, scopes: frozenset[KeyScope], expires_at: float | None) -> tuple[ApiKey, str]:
    """A new key and its row. Raises InvalidRequestError."""
    if name == BOOTSTRAP:
        raise InvalidRequestError.at("/name", f"{BOOTSTRAP!r} is the name of the key that the settings give")
    if expires_at is not None and expires_at <= jobs.now(session):
        raise InvalidRequestError.at("/expires_at", "expected a time to come")
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
    """The key opens nothing any more. Raises NotFoundError; ConflictError for the last of the scope admin, if asked."""
    row = api_keys.get(session, key_id)
    if keep_an_admin and [key.id for key in api_keys.active(session, KeyScope.ADMIN)] == [row.id]:
        raise ConflictError("this is the last key with the scope admin: make another one first")
    api_keys.revoke(session, row.id)


def authenticate(uow: UnitOfWork, token: str) -> Caller | None:
    """Whose key it is; None if it is nobody's, expired or revoked."""
    if not _TOKEN.fullmatch(token):
        return None
    digest = token_hash(token)
    with uow.reading() as session:
        candidates = api_keys.candidates(session, token[:_PREFIX_LENGTH])
    found = [one for one in candidates if hmac.compare_digest(one.sha256, digest)]
    if not found:
        return None
    if found[0].use_is_news:
        _note_use(uow, found[0].id)
    granted = (KeyScope(scope).includes for scope in found[0].scopes)
    return Caller(found[0].id, frozenset[KeyScope]().union(*granted))


def _note_use(uow: UnitOfWork, key_id: str) -> None:
    try:
        with uow.writing() as session:
            api_keys.note_use(session, key_id)
    except OperationalError:
        _logger.warning("the use of %s cannot be noted just now", key_id)


def prepare(uow: UnitOfWork, settings: Settings) -> None:
    """Make the settings' key good, and one that they gave before no longer. Raises StartError if nobody could enter."""
    token = settings.bootstrap_admin_key.get_secret_value()
    if token and not _TOKEN.fullmatch(token):
        raise StartError(
            "DFUSION_BOOTSTRAP_ADMIN_KEY: expected dfk_ and then 32 to 200 letters, digits, '-' or '_'; "
            'for example "dfk_$(openssl rand -hex 32)"'
        )
    try:
        _prepare(uow, settings.auth, token)
    except IntegrityError:  # another process of this installation starts at the same moment
        _prepare(uow, settings.auth, token)


def _prepare(uow: UnitOfWork, auth: bool, token: str) -> None:
    with uow.writing() as session:
        known = api_keys.named(session, BOOTSTRAP)
        digest = token_hash(token) if token else ""
        for row in known:
            if row.sha256 != digest:
                api_keys.revoke(session, row.id)
        if token and digest not in {row.sha256 for row in known}:
            _add(session, BOOTSTRAP, token, frozenset({KeyScope.ADMIN}), None)
        if auth and not api_keys.active(session, KeyScope.ADMIN):
            raise StartError(
                "DFUSION_AUTH is on and there is no key with the scope admin: set DFUSION_BOOTSTRAP_ADMIN_KEY to one "
                "that was not revoked"
            )
