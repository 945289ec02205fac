"""The service on a small random pipeline: settings, requests, and a worker in the test process."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, make_url, select

from service.db.migrate import migrate
from service.db.tables import Table
from service.db.unit_of_work import make_engine
from service.jobs import execution
from service.jobs.execution import Claim
from service.service import Service
from service.settings import Settings
from tests.servers import PostgresServer

PROMPTS = [
    {"text": "a red and striped circle", "items": ["circle"], "thresholds": [0.02]},
    {"text": "the red circle above the blue square", "items": ["circle", "square"], "thresholds": [0.02, 0.03]},
    {"text": "a blue and dotted star", "items": ["star"], "thresholds": [0.03]},
]
SCORERS = {
    "brightness": "tests.scorers:Brightness",
    "constant": "tests.scorers:Constant",
    "lost-device": "tests.scorers:LostDevice",
    "partial": "tests.scorers:Partial",
    "hanging": "tests.scorers:Hanging",
    "aborting": "tests.scorers:Aborting",
    "rising": "tests.scorers:Rising",
    "falling": "tests.scorers:Falling",
}
HASTE: dict[str, Any] = {
    "worker_niceness": 0,  # other suites run at the same time
    "lease_seconds": 20,
    "heartbeat_seconds": 0.1,
    "poll_seconds": 0.2,
    "sweep_seconds": 0.5,
    "retry_seconds": 0.05,
    "restart_seconds": 0.1,
}
"""Settings that are other than an operator's because tests do not wait."""


def settings_for(data_dir: Path, pipeline: Path, **changes: Any) -> Settings:
    """Return settings of a fast installation with the model `tiny`. Ignores the environment."""
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "database_url": "",
        "embedded_worker": False,
        "device": "cpu",
        "torch_threads": 1,
        "batch_size": 4,
        "shard_prompts": 2,
        "models": {"tiny": str(pipeline)},
        "scorers": SCORERS,
        **HASTE,
    }
    return Settings(_env_file=None, **(values | changes))  # type: ignore[call-arg]


def round_body(**changes: Any) -> dict[str, Any]:
    """Return a small request body for POST /rounds."""
    body = {
        "model": "tiny",
        "prompts": PROMPTS,
        "rounds": 1,
        "samples_per_prompt": 4,
        "seed": 7,
        "sampling": {"num_steps": 4},
        "fusion": {"first_step": 1, "last_step": 3},
        "training": {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1},
        "reward": "brightness",
        "evaluation": {"samples_per_prompt": 1, "scorers": ["brightness"]},
    }
    return body | changes


def service_of(client: TestClient) -> Service:
    """Return the service behind a test client."""
    service = client.app.state.service  # type: ignore[attr-defined]
    assert isinstance(service, Service)
    return service


def row_counts(service: Service) -> dict[str, int]:
    """Return the number of rows of each table."""
    with service.uow.reading() as session:
        return {
            name: session.scalars(select(func.count()).select_from(table)).one()
            for name, table in Table.metadata.tables.items()
        }


def work_until_idle(service: Service, most: int = 100, until: Callable[[Claim], bool] = lambda _claim: False) -> None:
    """Run all stages that can be claimed, sequentially in this process.

    Stops at the first stage for which `until` is true, and returns that stage to the queue.
    """
    from worker.runner import run_stage
    from worker.workbench import Workbench

    bench, stop = Workbench.of(service), threading.Event()
    for _ in range(most):
        claim = execution.claim(service.uow, service.settings, "test")
        if claim is None:
            return
        if until(claim):
            return execution.give_back(service.uow, service.settings, claim)
        run_stage(bench, claim, stop)
    raise AssertionError(f"still work after {most} stages")


def migrated_template(server: PostgresServer) -> str:
    """Create a migrated database to copy from. Returns its name."""
    url = server.create_database()
    engine = make_engine(url)
    migrate(engine, Path("unused"))
    engine.dispose()
    return str(make_url(url).database)


@contextmanager
def tables_by_copy(folder: Path) -> Iterator[None]:
    """During the block, create SQLite databases by copying a migrated one without rows.

    Hundreds of tests start a service, and looking for migrations takes most of that time. The tests of migrations do
    not use this.
    """
    template = folder / "template.db"
    engine = make_engine(f"sqlite:///{template}")
    migrate(engine, folder / "migrate.lock")
    engine.dispose()

    def copy_or_migrate(engine: Engine, lock: Path) -> None:
        database = engine.url.database
        if engine.dialect.name == "sqlite" and database is not None and not Path(database).exists():
            shutil.copy(template, database)
        else:
            migrate(engine, lock)

    with patch("service.service.migrate", copy_or_migrate):
        yield


@contextmanager
def models_loaded_once() -> Iterator[None]:
    """During the block, the stages of this process load a base model once, and not for each `work_until_idle`.

    As in a worker, which keeps the model, the next stage gets it without the adapter of the stage before.
    """
    from dfusion.adapter import detach
    from dfusion.models import DiffusionModel

    load = lru_cache(maxsize=2)(DiffusionModel.load)

    def without_adapter(*arguments: Any, **options: Any) -> DiffusionModel:
        model = load(*arguments, **options)
        detach(model.unet)
        return model

    # other users of the class load models of their own
    with patch("worker.model_cache.DiffusionModel", SimpleNamespace(load=without_adapter)):
        yield


@contextmanager
def working(service: Service) -> Iterator[None]:
    """Run a worker in a thread of this process for the duration of the block."""
    from dfusion import _torchvision_ops  # noqa: F401  (before diffusers or peft)

    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.05):
            work_until_idle(service)

    thread = threading.Thread(target=work)
    with models_loaded_once():
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(120)
