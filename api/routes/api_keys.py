"""Routes that create, list and revoke API keys. They need a key with the scope admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response, status

from api.access import require_scope
from api.converters.api_keys import api_key_created, api_key_out
from api.converters.common import convert_page
from api.deps import PageParameters, ServiceDep
from api.openapi import CREATED_KEY
from api.wire.api_keys import ApiKeyCreated, ApiKeyIn, ApiKeyOut
from api.wire.common import ListOut
from service import keys
from service.db.queries import api_keys, jobs

router = APIRouter(prefix="/api-keys", tags=["API keys"], dependencies=[require_scope("admin")])


@router.post("", status_code=status.HTTP_201_CREATED, responses={status.HTTP_201_CREATED: CREATED_KEY})
def make_key(body: ApiKeyIn, service: ServiceDep) -> ApiKeyCreated:
    """Create a key. Only this response contains the key itself."""
    expires_at = None if body.expires_at is None else body.expires_at.timestamp()
    with service.uow.writing() as session:
        row, token = keys.create(session, body.name, frozenset(body.scopes), expires_at)
        session.refresh(row)
        return api_key_created(row, jobs.now(session), token)


@router.get("")
def list_keys(service: ServiceDep, page: Annotated[PageParameters, Query()]) -> ListOut[ApiKeyOut]:
    """List keys, newest first, including revoked and expired ones."""
    with service.uow.reading() as session:
        rows = api_keys.page(session, page.limit, page.cursor)
        now = jobs.now(session)
        return convert_page(ListOut[ApiKeyOut], rows, lambda row: api_key_out(row, now))


@router.delete("/{key_id}", status_code=status.HTTP_204_NO_CONTENT, response_class=Response)
def revoke_key(key_id: str, service: ServiceDep) -> None:
    """Revoke a key. Revoking a revoked key has no effect."""
    with service.uow.writing() as session:
        keys.revoke(session, key_id, keep_an_admin=service.settings.auth)
