"""Access control: authentication, scopes and rate limits.

The middleware `Guard` authenticates each request, except those to the open paths. Browsers send the cookie of a session
instead of a key. A route declares its scope with `require_scope`; the service refuses to start if a route has none.
If `auth` is off, only this machine has access.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.params import Depends as Dependency
from fastapi.responses import Response
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import problem
from api.pages import assets
from api.routes import docs
from api.token_buckets import ExpiringSet, retry_after
from service import browser_sessions, keys
from service.errors import ForbiddenError, StartError
from service.keys import ANYONE, Caller
from service.service import Service
from service.settings import Settings
from service.states import KeyScope

if TYPE_CHECKING:
    from api.rate_limit import RateLimit

SIGN_IN_PATH = "/sign-in"
SIGN_OUT_PATH = "/sign-out"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs", SIGN_IN_PATH}) | docs.ASSETS | assets.ASSETS
"""Paths that require no API key: health checks, documentation, and the sign-in page with its files."""
SESSION_COOKIE = "dfusion_session"
NEW_RUN_PATH = "/rounds/new"
FORM_PATHS = frozenset({SIGN_OUT_PATH, NEW_RUN_PATH})
"""Paths of forms, which work without scripts: they check the session's token themselves (`api.pages.form_body`)."""
CSRF_HEADER = "X-CSRF-Token"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SAME_SITE = frozenset({"same-origin", "none"})
"""Values of Sec-Fetch-Site of requests by a page of this service, or by the user."""
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
_KNOWN_SECONDS = 3600.0
"""How long a valid key counts as known."""
_SECURITY_SCHEME = "apiKey"


@dataclass(frozen=True)
class RequiredScope:
    """The dependency of a route on a scope of the caller's key. Raises ForbiddenError if the key lacks the scope."""

    scope: KeyScope

    async def __call__(self, request: Request) -> None:
        caller: Caller = request.state.caller
        if self.scope not in caller.scopes:
            raise ForbiddenError(self.scope)


def require_scope(scope: str) -> Dependency:
    """Require a scope (read, submit, review or admin). For `dependencies=` of a router or a route."""
    return cast(Dependency, Depends(RequiredScope(KeyScope(scope))))


def open_paths(settings: Settings) -> frozenset[str]:
    """Return the paths that require no API key under these settings."""
    return OPEN_PATHS | {"/metrics"} if settings.metrics_open else OPEN_PATHS


def require_closed_or_local(settings: Settings) -> None:
    """Raises StartError if other machines can reach the service and `auth` is off, unless `allow_open` is set."""
    if not settings.auth and not settings.allow_open and not _is_loopback(settings.host):
        raise StartError(
            f"DFUSION_HOST={settings.host} is reachable by other machines, and DFUSION_AUTH is off: set "
            "DFUSION_AUTH=true and DFUSION_BOOTSTRAP_ADMIN_KEY, or DFUSION_ALLOW_OPEN=true to grant everyone all scopes"
        )


def require_declared_scopes(app: FastAPI) -> None:
    """Raises StartError if a route that is not open declares no scope."""
    undeclared = [context.path for context in _guarded(app) if not scopes_of(context)]
    if undeclared:
        raise StartError(
            f"no scope is declared for {', '.join(map(str, undeclared))}: use dependencies=[require_scope(…)]"
        )


def scopes_of(context: RouteContext) -> list[KeyScope]:
    """Return the scopes that a route requires; the caller's key must have all of them."""
    if not isinstance(context.original_route, APIRoute):
        return []
    return [d.dependency.scope for d in context.dependencies if isinstance(d.dependency, RequiredScope)]


def _guarded(app: FastAPI) -> Iterator[RouteContext]:
    """Yield the routes that are not open."""
    for context in iter_route_contexts(app.routes):
        if context.path not in OPEN_PATHS:
            yield context


def describe_security(app: FastAPI, schema: dict[str, Any]) -> None:
    """Add the security scheme and the scopes of each operation to the OpenAPI document."""
    scheme = {"type": "http", "scheme": "bearer", "description": "API key (dfk_…), created by POST /api-keys"}
    schema.setdefault("components", {}).setdefault("securitySchemes", {})[_SECURITY_SCHEME] = scheme
    for context in _guarded(app):
        for method in context.methods or ():
            operation = schema["paths"].get(context.path_format, {}).get(method.lower())
            if operation is not None:
                operation["security"] = [{_SECURITY_SCHEME: sorted(set(scopes_of(context)))}]


class Guard:
    """Middleware that stores the caller in `request.state.caller`, or responds with an error."""

    def __init__(self, app: ASGIApp, settings: Settings, rate_limit: RateLimit | None) -> None:
        self._app = app
        self._settings = settings
        self._open = open_paths(settings)
        self._rate_limit = rate_limit
        self._refused = ExpiringSet()
        """Addresses that have used up their rate with invalid keys."""
        self._known = ExpiringSet()
        """Hashes of keys that were valid."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        request = Request(scope, receive)
        error_response = await self._check(request)
        await (error_response or self._app)(scope, receive, send)

    async def _check(self, request: Request) -> Response | None:
        """Set the caller of the request. Returns the error response if the request is refused, otherwise None."""
        # 1. without keys, only requests from this machine
        if not self._settings.auth and not self._settings.allow_open and (reason := _not_local(request)):
            detail = f"{reason}; without API keys, only local access is allowed"
            return problem(HTTPStatus.FORBIDDEN, "not_local", detail)

        # 2. a change that a page of another site requests
        if _is_cross_site(request):
            detail = "the request comes from a page of another site"
            return problem(HTTPStatus.FORBIDDEN, "cross_site", detail)

        # 3. open paths; each attempt to sign in counts
        address = request.client.host if request.client else ""
        if request.scope["path"] in self._open:
            request.state.caller = ANYONE if not self._settings.auth else Caller(None, frozenset({KeyScope.READ}))
            if request.method == "POST" and self._rate_limit is not None:
                if wait := await self._rate_limit.take(f"address {address}"):
                    return self._too_many_requests(wait)
            return None

        # 4. an address that has sent too many invalid keys: its next unknown key is not looked up
        token = _token(request)
        if (wait := self._refused.seconds_left(address)) and not self._is_known(token):
            return self._too_many_requests(wait)

        # 5. the caller of the API key, or of the browser's session
        try:
            caller = await self._caller(request, token)
        except SQLAlchemyError:
            detail = "cannot check the API key: the database is unavailable"
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, "database", detail, headers={"Retry-After": "5"})

        # 6. rate limit, by key or by address
        if self._rate_limit is not None:
            if wait := await self._rate_limit.take((caller.key_id if caller else None) or f"address {address}"):
                if caller is None:
                    self._refused.add(address, wait)
                return self._too_many_requests(wait)

        if caller is None:
            return _unauthorized(request)
        request.state.caller = caller
        return _csrf_error(request)

    async def _caller(self, request: Request, token: str | None) -> Caller | None:
        """Authenticate the request. Returns None if it has neither a valid API key nor a session."""
        if not self._settings.auth:
            return ANYONE
        service: Service = request.app.state.service
        if token is None:
            return await self._caller_of_session(request, service)
        caller = await run_in_threadpool(keys.authenticate, service.uow, token)
        if caller is not None:
            self._known.add(keys.token_hash(token), _KNOWN_SECONDS)
        return caller

    async def _caller_of_session(self, request: Request, service: Service) -> Caller | None:
        """The caller with the session of the cookie. A request with an Authorization header has no session."""
        session_token = request.cookies.get(SESSION_COOKIE)
        if session_token is None or "authorization" in request.headers:
            return None
        caller = await run_in_threadpool(browser_sessions.authenticate, service.uow, session_token)
        if caller is not None:
            request.state.session_token = session_token
        return caller

    def _is_known(self, token: str | None) -> bool:
        """Whether the key was valid when it was last looked up."""
        return token is not None and self._known.seconds_left(keys.token_hash(token)) > 0

    def _too_many_requests(self, wait_seconds: float) -> Response:
        detail = f"expected at most {self._settings.requests_per_second:g} requests per second"
        headers = {"Retry-After": str(retry_after(wait_seconds))}
        return problem(HTTPStatus.TOO_MANY_REQUESTS, "too_many_requests", detail, headers=headers)


def _token(request: Request) -> str | None:
    """Return the bearer token, or None if there is not exactly one well-formed Authorization header."""
    headers = request.headers.getlist("authorization")
    match = _BEARER.fullmatch(headers[0].strip(" \t")) if len(headers) == 1 else None
    return match[1] if match else None


def _unauthorized(request: Request) -> Response:
    challenge = 'Bearer realm="dfusion"'
    if "authorization" in request.headers:
        challenge += ', error="invalid_token"'
        detail = "the API key is malformed, unknown, expired or revoked; expected Authorization: Bearer dfk_…"
    else:
        detail = "expected an API key: Authorization: Bearer dfk_…"
    headers = {"WWW-Authenticate": challenge}
    return problem(HTTPStatus.UNAUTHORIZED, "unauthorized", detail, headers=headers)


def _is_cross_site(request: Request) -> bool:
    """Whether a page of another site sent this request for a change. Programs send neither of the two headers."""
    if request.method in _SAFE_METHODS:
        return False
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in _SAME_SITE
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2] != request.headers.get("host", "")


def _csrf_error(request: Request) -> Response | None:
    """The error response for a change by a session without its token. Forms have their own check."""
    token: str | None = getattr(request.state, "session_token", None)
    if token is None or request.method in _SAFE_METHODS or request.scope["path"] in FORM_PATHS:
        return None
    if browser_sessions.is_csrf_token(token, request.headers.get(CSRF_HEADER, "")):
        return None
    return problem(HTTPStatus.FORBIDDEN, "csrf", f"expected the {CSRF_HEADER} of the page; reload the page")


def _not_local(request: Request) -> str | None:
    """Return why a request is not local, or None if it is.

    It may come from another machine, or from another site's page in a browser on this machine.
    """
    server = request.scope.get("server")
    if server and server[1] is not None and _is_ip(server[0]) and not _is_loopback(server[0]):
        return f"the request arrived at the network address {server[0]}"
    host = request.headers.get("host", "")
    if not _names_this_machine(host):
        return f"Host: {host!r} does not name this machine"
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return f"Origin: {origin!r} does not match Host: {host!r}"
    return None


def _names_this_machine(host: str) -> bool:
    """Whether the Host header is a loopback address or a plain name. In the DNS, a name with a dot can be anyone's."""
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
