"""The service's HTTP application: `uvicorn --factory api.main:create_app`, or `python -m api`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from api import errors
from api.body import BodyGuard
from api.broker import open_queue
from api.core.locks import file_lock
from api.core.service import Service
from api.core.settings import Settings
from api.embedded import WorkerSupervisor
from api.routes import artifacts, health, jobs, prompt_sets, results, submissions, workers
from api.schemas import Problem


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; the settings come from the environment unless they are given."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            if settings.database.startswith("sqlite"):
                stack.enter_context(file_lock(settings.data_dir / "service.lock"))
            service = Service.open(settings, open_queue(settings))
            stack.callback(service.close)
            app.state.service, app.state.supervisor = service, None
            if settings.embedded_worker and not settings.broker:
                app.state.supervisor = WorkerSupervisor(service)
                app.state.supervisor.start()
                stack.callback(app.state.supervisor.stop)
            yield

    problem = {"model": Problem, "content": {errors.MEDIA_TYPE: {}}}
    app = FastAPI(
        title="D-Fusion",
        version=_version(),
        description="Online preference training of text-to-image diffusion models on visually consistent pairs.",
        lifespan=lifespan,
        responses={"4XX": problem, "5XX": problem},
        redirect_slashes=False,
    )
    app.add_middleware(BodyGuard, max_bytes=settings.max_body_bytes)
    errors.install(app)
    for module in (submissions, jobs, results, artifacts, prompt_sets, workers, health):
        app.include_router(module.router)
    return app


def _version() -> str:
    try:
        return version("dfusion")
    except PackageNotFoundError:
        return "0"
