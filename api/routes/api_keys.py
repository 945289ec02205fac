"""API keys: made, listed and revoked by a key with the scope admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response, status

from api.access import needs
from api.converters.api_keys import api_key_made, api_key_out
from api.converters.common import list_of
from api.deps import PageParameters, ServiceDep
from api.openapi import MADE_KEY
from api.wire.api_keys import ApiKeyIn, ApiKeyMade, ApiKeyOut
from api.wire.common import ListOut
from service import keys
from service.db.queries import api_keys, jobs

router = APIRouter(prefix="/api-keys", tags=["API keys"], dependencies=[needs("admin")])


@router.post("", status_code=status.HTTP_201_CREATED, responses={status.HTTP_201_CREATED: MADE_KEY})
def make_key(body: ApiKeyIn, service: ServiceDep) -> ApiKeyMade:
    """Make a key. The answer is the only place where it is ever shown."""
    expires_at = None if body.expires_at is None else body.expires_at.timestamp()
    with service.uow.writing() as session:
        row, token = keys.create(session, body.name, frozenset(body.scopes), expires_at)
        session.refresh(row)
        return api_key_made(row, jobs.now(session), token)


@router.get("")
def list_keys(service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[ApiKeyOut]:
    """Keys, newest first, revoked and expired ones too."""
    with service.uow.reading() as session:
        found, now = api_keys.page(session, page.limit, page.cursor), jobs.now(session)
        return list_of(ListOut[ApiKeyOut], found, lambda row: api_key_out(row, now))


@router.delete("/{key_id}", status_code=status.HTTP_204_NO_CONTENT, response_class=Response)
def revoke_key(key_id: str, service: ServiceDep) -> None:
    """Revoke a key; one that is revoked stays so."""
    with service.uow.writing() as session:
        keys.revoke(session, key_id, keep_an_admin=service.settings.auth)
