"""The service's HTTP application: `uvicorn --factory api.main:create_app`, or `python -m api`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import access, errors, openapi
from api.body import BodyValidationMiddleware
from api.deps import refuse_repeated_parameters
from api.embedded import WorkerSupervisor
from api.head import HeadMiddleware
from api.metrics import HttpMetrics, InstallationMetrics
from api.observe import ObservabilityMiddleware
from api.pages.middleware import PagesMiddleware
from api.pages.routes import ROUTERS, page_paths
from api.readiness import Readiness
from api.routes import (
    api_keys,
    artifacts,
    docs,
    health,
    jobs,
    metrics,
    preference_tests,
    prompt_sets,
    results,
    submissions,
    verdicts,
    webhooks,
    workers,
)
from api.shared_text import SharedText
from service import keys
from service.broker import open_queue
from service.db.unit_of_work import API_POOL
from service.errors import StartError
from service.file_lock import file_lock
from service.service import Service
from service.settings import Settings

if TYPE_CHECKING:
    from api.rate_limit import RateLimit


class Application(FastAPI):
    """FastAPI with observability as the outermost middleware and a completed OpenAPI document."""

    def __init__(self, settings: Settings, http_metrics: HttpMetrics, **options: Any) -> None:
        super().__init__(**options)
        self.state.metrics = http_metrics
        self.state.is_stopping = False
        self._requires_keys = settings.auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Report a StartError by its message: Starlette would report its stack trace, which the server then logs."""

        async def send_reason(message: Message) -> None:
            error = sys.exception()
            if message["type"] == "lifespan.startup.failed" and isinstance(error, StartError):
                message = {**message, "message": f"cannot start: {error}"}
            await send(message)

        await super().__call__(scope, receive, send_reason if scope["type"] == "lifespan" else send)

    def build_middleware_stack(self) -> ASGIApp:
        pages = PagesMiddleware(super().build_middleware_stack(), page_paths(), self._requires_keys)
        return ObservabilityMiddleware(pages, self.state.metrics)

    def openapi(self) -> dict[str, Any]:
        is_new = self.openapi_schema is None
        schema = super().openapi()
        if is_new:
            openapi.complete(schema)
        if is_new and self._requires_keys:
            access.describe_security(self, schema)
        return schema


def create_app(settings: Settings | None = None, http_metrics: HttpMetrics | None = None) -> FastAPI:
    """Create the application.

    Args:
        settings: The settings; read from the environment if not given.
        http_metrics: Counts the requests; if not given, those of this process.

    Returns:
        The application. Its startup may raise StartError.

    Raises:
        StartError: A setting is invalid, or they would allow access from the network without API keys.
    """
    settings = settings or Settings.read()
    access.require_closed_or_local(settings)
    rate_limit = _rate_limit(settings)
    shared_text = SharedText()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        access.require_declared_scopes(app)
        async with AsyncExitStack() as stack:
            if rate_limit is not None:
                stack.push_async_callback(rate_limit.close)
            if settings.database.startswith("sqlite"):
                stack.enter_context(file_lock(settings.data_dir / "service.lock"))

            pool = API_POOL.divided_by(settings.api_processes)
            service = Service.open(settings, open_queue(settings), pool=pool)
            stack.callback(service.close)
            keys.prepare(service.uow, settings)
            app.state.service = service

            app.state.installation_metrics = InstallationMetrics(service, shared_text)

            app.state.supervisor = None
            if settings.embedded_worker and not settings.broker:
                app.state.supervisor = WorkerSupervisor(service)
                app.state.supervisor.start()
                stack.callback(app.state.supervisor.stop)

            app.state.readiness = Readiness(service, app.state.supervisor)
            stack.callback(app.state.readiness.close)
            yield

    app = Application(
        settings,
        http_metrics or HttpMetrics(),
        title="D-Fusion",
        version=_version(),
        description="Online preference training of text-to-image diffusion models on visually consistent pairs.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyValidationMiddleware, max_bytes=settings.max_body_bytes)
    app.add_middleware(access.Guard, settings=settings, rate_limit=rate_limit)
    app.add_middleware(HeadMiddleware)
    errors.install(app)
    app.router.routes.extend(_routes())
    return app


def _rate_limit(settings: Settings) -> RateLimit | None:
    if not settings.requests_per_second:
        return None
    from api.rate_limit import RateLimit  # with Redis, which is needed for nothing else without a broker

    return RateLimit(settings)


@cache
def _routes() -> list[BaseRoute]:
    """Return the routes of every application of this process: FastAPI takes long to resolve their dependencies."""
    root = APIRouter(
        responses=openapi.PROBLEMS,
        generate_unique_id_function=lambda route: route.name,
        dependencies=[Depends(refuse_repeated_parameters)],
    )
    modules = (
        submissions,
        jobs,
        results,
        preference_tests,
        verdicts,
        artifacts,
        prompt_sets,
        workers,
        api_keys,
        webhooks,
        health,
        metrics,
        docs,
    )
    for router in (*ROUTERS, *(module.router for module in modules)):
        root.include_router(router)
    return root.routes


def _version() -> str:
    try:
        return version("dfusion")
    except PackageNotFoundError:
        return "0"
