"""Who gets in: keys at the door, scopes at each route, and how often.

The middleware `Guard` lets nobody past without a key but to the open paths; a route says what scope it takes by
`needs`; a service with a route that says nothing does not start. Without keys (the setting `auth`), only this machine
gets in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.params import Depends as Dependency
from fastapi.responses import Response
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import problem
from api.rate_limit import RateLimit
from api.token_buckets import retry_after
from service import keys
from service.errors import ForbiddenError, StartError
from service.keys import ANYONE, Caller
from service.service import Service
from service.settings import Settings
from service.states import KeyScope

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""What answers without a key: whether the service lives, and how it is to be used."""
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
_SECURITY_SCHEME = "apiKey"


@dataclass(frozen=True)
class Needs:
    """A route's dependency: the caller's key must have the scope. Raises ForbiddenError."""

    scope: KeyScope

    async def __call__(self, request: Request) -> None:
        caller: Caller = request.state.caller
        if self.scope not in caller.scopes:
            raise ForbiddenError(self.scope)


def needs(scope: str) -> Dependency:
    """For `dependencies=` of a router or a route: read, submit, review or admin."""
    return cast(Dependency, Depends(Needs(KeyScope(scope))))


def open_paths(settings: Settings) -> frozenset[str]:
    """The paths that take no key in this installation."""
    return OPEN_PATHS | {"/metrics"} if settings.metrics_open else OPEN_PATHS


def require_closed_or_local(settings: Settings) -> None:
    """Raises StartError for a service that other machines would reach and that asks nobody for a key."""
    if not settings.auth and not settings.allow_open and not _is_loopback(settings.host):
        raise StartError(
            f"DFUSION_HOST={settings.host} lets other machines in, and DFUSION_AUTH is off: set DFUSION_AUTH=true and "
            "DFUSION_BOOTSTRAP_ADMIN_KEY, or DFUSION_ALLOW_OPEN=true to let everyone do everything"
        )


def require_scopes(app: FastAPI) -> None:
    """Raises StartError for a route that is not open and does not say what scope it takes."""
    silent = [context.path for context in _guarded(app) if not scopes_of(context)]
    if silent:
        raise StartError(f"no scope is declared for {', '.join(map(str, silent))}: use dependencies=[needs(…)]")


def scopes_of(context: RouteContext) -> list[KeyScope]:
    """The scopes that a route takes, all of them."""
    if not isinstance(context.original_route, APIRoute):
        return []
    return [d.dependency.scope for d in context.dependencies if isinstance(d.dependency, Needs)]


def _guarded(app: FastAPI) -> Iterator[RouteContext]:
    for context in iter_route_contexts(app.routes):
        if context.path not in OPEN_PATHS:
            yield context


def describe_security(app: FastAPI, schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document which key each operation takes."""
    scheme = {"type": "http", "scheme": "bearer", "description": "An API key, dfk_…, that POST /api-keys made"}
    schema.setdefault("components", {}).setdefault("securitySchemes", {})[_SECURITY_SCHEME] = scheme
    for context in _guarded(app):
        for method in context.methods or ():
            operation = schema["paths"].get(context.path_format, {}).get(method.lower())
            if operation is not None:
                operation["security"] = [{_SECURITY_SCHEME: sorted(set(scopes_of(context)))}]


class Guard:
    """Middleware that lets a request past with its caller in `request.state.caller`, or answers it."""

    def __init__(self, app: ASGIApp, settings: Settings, rate_limit: RateLimit | None) -> None:
        self._app, self._settings = app, settings
        self._open = open_paths(settings)
        self._rate_limit = rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        refusal = await self._refusal(request)
        await (refusal or self._app)(scope, receive, send)

    async def _refusal(self, request: Request) -> Response | None:
        """Why the request may not go on, None if it may."""
        if not self._settings.auth and not self._settings.allow_open and (wrong := _not_local(request)):
            return problem(HTTPStatus.FORBIDDEN, "not_local", f"{wrong}; this service asks for no keys")
        if request.scope["path"] in self._open:
            request.state.caller = ANYONE if not self._settings.auth else Caller(None, frozenset({KeyScope.READ}))
            return None
        try:
            caller = await self._caller(request)
        except SQLAlchemyError:
            detail = "the service cannot look up the key just now"
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, "database", detail, headers={"Retry-After": "5"})
        if self._rate_limit is not None:
            address = request.client.host if request.client else ""
            if wait := await self._rate_limit.take((caller.key_id if caller else None) or f"address {address}"):
                detail = f"expected at most {self._settings.requests_per_second:g} requests a second"
                headers = {"Retry-After": str(retry_after(wait))}
                return problem(HTTPStatus.TOO_MANY_REQUESTS, "too_many_requests", detail, headers=headers)
        if caller is None:
            return _who_are_you(request)
        request.state.caller = caller
        return None

    async def _caller(self, request: Request) -> Caller | None:
        if not self._settings.auth:
            return ANYONE
        token = _token(request)
        if token is None:
            return None
        service: Service = request.app.state.service
        return await run_in_threadpool(keys.authenticate, service.uow, token)


def _token(request: Request) -> str | None:
    """The bearer token of a well-formed Authorization header that comes once."""
    given = request.headers.getlist("authorization")
    found = _BEARER.fullmatch(given[0].strip(" \t")) if len(given) == 1 else None
    return found[1] if found else None


def _who_are_you(request: Request) -> Response:
    challenge = 'Bearer realm="dfusion"'
    if "authorization" in request.headers:
        challenge += ', error="invalid_token"'
        detail = "the key is malformed, unknown, expired or revoked; expected Authorization: Bearer dfk_…"
    else:
        detail = "expected an API key: Authorization: Bearer dfk_…"
    headers = {"WWW-Authenticate": challenge}
    return problem(HTTPStatus.UNAUTHORIZED, "unauthorized", detail, headers=headers)


def _not_local(request: Request) -> str | None:
    """Why a request comes from elsewhere: another machine, or another site's page in a browser on this one."""
    server = request.scope.get("server")
    if server and server[1] is not None and _is_ip(server[0]) and not _is_loopback(server[0]):
        return f"it came over the network, by {server[0]}"
    host = request.headers.get("host", "")
    if not _names_this_machine(host):
        return f"Host: {host!r} is not this machine's"
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return f"Origin: {origin!r} is another site"
    return None


def _names_this_machine(host: str) -> bool:
    """Whether the Host header is a loopback address or a plain name. A name with a dot may be anyone's in the DNS."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return _is_loopback(name) if _is_ip(name) else "." not in name.removesuffix(".localhost")


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback if _is_ip(host) else host.lower() == "localhost"
