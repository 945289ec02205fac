"""Routes for signing in with an API key, and out."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from pydantic import Field

from api.access import SESSION_COOKIE, SIGN_IN_PATH, SIGN_OUT_PATH, require_scope
from api.deps import Parameters, ServiceDep
from api.pages.form_body import read_form, require_token
from api.pages.render import render
from service import browser_sessions

router = APIRouter(include_in_schema=False)


class SignInParameters(Parameters):
    """`next`: the page to show after signing in."""

    next: str = Field("/", max_length=2000)


@router.get(SIGN_IN_PATH)
async def get_sign_in(
    request: Request, service: ServiceDep, parameters: Annotated[SignInParameters, Query()]
) -> Response:
    """Show the form for the API key."""
    if not service.settings.auth:
        return RedirectResponse("/", HTTPStatus.SEE_OTHER)
    return render(request, "sign-in.html", next=_local(parameters.next), error=None)


@router.post(SIGN_IN_PATH)
async def sign_in(request: Request, service: ServiceDep) -> Response:
    """Start a session and set its cookie, which scripts cannot read and other sites cannot use."""
    form = await read_form(request)
    target = _local(form.get("next", "/"))
    token = await run_in_threadpool(browser_sessions.sign_in, service.uow, form.get("key", "").strip())
    if token is None:
        error = "This key is unknown, expired or revoked. A key starts with dfk_."
        return render(request, "sign-in.html", HTTPStatus.UNPROCESSABLE_ENTITY, next=target, error=error)

    response = RedirectResponse(target, HTTPStatus.SEE_OTHER)
    response.set_cookie(
        SESSION_COOKIE,
        token,
        max_age=browser_sessions.LIFETIME_SECONDS,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


@router.post(SIGN_OUT_PATH, dependencies=[require_scope("read")])
async def sign_out(request: Request, service: ServiceDep) -> Response:
    """End the session."""
    token: str | None = getattr(request.state, "session_token", None)
    form = await read_form(request)
    require_token(request, form)
    if token is not None:
        await run_in_threadpool(browser_sessions.sign_out, service.uow, token)

    response = RedirectResponse(SIGN_IN_PATH, HTTPStatus.SEE_OTHER)
    response.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
    return response


def _local(target: str) -> str:
    """`target` if it is a path of this service, otherwise "/"."""
    is_path = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return target if is_path and target.isprintable() else "/"
