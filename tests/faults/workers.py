"""Faults of worker processes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import psutil
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from service.db.tables import Artifact, Event, Model, Sample, Stage
from tests.deployment import DEPLOYED, EMBEDDED, PATIENCE_SECONDS, WORKERS, until
from tests.faults.site import KINDS, LONG_TRAINING, ROUND, SAMPLING, Site
from tests.service import PROMPTS, round_body

HANGING = round_body(
    prompts=PROMPTS[:1],
    samples_per_prompt=20,
    sampling={"num_steps": 2},
    reward="hanging",
    fusion=None,
    evaluation=None,
)
"""The scorer hangs at its fourth of five batches, when a batch is known to be short."""
ABORTING = HANGING | {"samples_per_prompt": 2, "reward": "aborting"}
MAX_CRASHES = 3


def kill_workers(site: Site, dice: random.Random, kills: int = 3) -> int:
    """Kill workers with SIGKILL during stages of any kind. In deployed mode, their Celery parents."""
    return _kill(site, dice, kills, KINDS, with_parent=True)


def kill_trainings(site: Site, dice: random.Random, kills: int = 2) -> int:
    """Kill the process that trains with SIGKILL. In deployed mode, its Celery parent replaces it."""
    return _kill(site, dice, kills, ("train",), with_parent=False)


def interrupt_a_training(site: Site, dice: random.Random, kills: int = 5) -> int:
    """Kill the process of one training again and again; its adapter equals that of an undisturbed one."""
    return _kill(site, dice, kills, ("train",), with_parent=False, body=LONG_TRAINING)


def _kill(
    site: Site,
    dice: random.Random,
    kills: int,
    kinds: Sequence[str],
    with_parent: bool,
    body: dict[str, Any] = ROUND,
) -> int:
    killed = 0
    while killed < kills:  # again if the process has just ended
        stage = site.catch(dice.choice(kinds), body=body)
        time.sleep(dice.uniform(0, 0.4))
        killed += kill_worker_of(site, stage, with_parent)
    return killed


def kill_worker_of(site: Site, stage: Stage, with_parent: bool) -> bool:
    """Kill the process that runs, or just ran, the stage. Returns whether there was one."""
    installed = site.installed
    worker = installed.worker_of(stage)
    if worker is None:
        return False
    if installed.mode == EMBEDDED or not with_parent:
        worker.kill()
        return True
    owner = str(stage.lease_owner)
    parent = installed.process[owner]
    parent.kill()
    parent.wait()
    until(lambda: _is_over(worker))  # the kernel kills the child
    installed.start_worker(owner)
    return True


def stop_a_worker(site: Site, dice: random.Random) -> int:
    """Stop a worker with SIGSTOP for longer than its lease. It writes nothing when it continues.

    In deployed mode its parent is stopped as well, which would replace it. In embedded mode the service replaces it, so
    that it never continues.
    """
    installed = site.installed
    if installed.mode == EMBEDDED:
        worker = None
        while worker is None:  # again if the process has just ended
            stage = site.catch("train")
            time.sleep(dice.uniform(0, 0.2))
            worker = installed.worker_of(stage)
        worker.suspend()
        until(lambda: not worker.is_running())
        assert "has not responded for" in installed.logs()
        return 1

    stage, worker, parent = _put_to_sleep(site, dice)
    try:
        until(lambda: _state(site, stage.id) == "succeeded")
        before = _rows_of(site, stage.id)
    finally:
        for process in (parent, worker):
            process.resume()
    # it finds that its lease is lost, or its watchdog ends it before
    until(lambda: _is_over(worker) or f"lost the lease on {stage.id}" in installed.logs())
    assert _rows_of(site, stage.id) == before
    return 1


def _put_to_sleep(site: Site, dice: random.Random) -> tuple[Stage, psutil.Process, psutil.Process]:
    """Stop a process that trains, and its parent. It must not be in a transaction, which would block all others."""
    while True:
        stage = site.catch("train")
        time.sleep(dice.uniform(0, 0.2))
        parent = psutil.Process(site.installed.process[str(stage.lease_owner)].pid)
        worker = site.installed.worker_of(stage)
        if worker is None:
            continue
        for process in (parent, worker):
            process.suspend()
        if _holds_no_lock(site, stage):
            return stage, worker, parent
        for process in (parent, worker):
            process.resume()


def _is_over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _holds_no_lock(site: Site, stage: Stage) -> bool:
    """Whether the stopped process still runs the stage and is not in a transaction, which would block all others."""
    try:
        with site.installed.service.uow.writing() as session:
            session.execute(text("SET LOCAL lock_timeout = 300"))
            session.execute(select(Stage).where(Stage.id == stage.id).with_for_update())
            session.execute(text("UPDATE jobs SET label = label WHERE id = :id"), {"id": stage.job_id})
    except SQLAlchemyError:
        return False
    return _state(site, stage.id) == "running"


def _state(site: Site, stage_id: str) -> str:
    with site.installed.service.uow.reading() as session:
        return str(session.scalars(select(Stage.state).where(Stage.id == stage_id)).one())


def _rows_of(site: Site, stage_id: str) -> list[Any]:
    """The rows of the stage, its outputs and its events."""
    with site.installed.service.uow.reading() as session:
        outputs: list[Any] = [
            tuple(row)
            for table in (Artifact, Sample, Model, Event)
            for row in session.execute(
                select(*table.__table__.columns).where(table.stage_id == stage_id).order_by(table.id)
            )
        ]
        return [*outputs, tuple(session.execute(select(*Stage.__table__.columns).where(Stage.id == stage_id)).one())]


def hang_in_a_step(site: Site, _dice: random.Random) -> int:
    """The main thread of a worker hangs in a step while its other threads renew the lease."""
    installed = site.installed
    (installed.settings.data_dir / "hung").unlink(missing_ok=True)
    job_id = installed.post("/rounds", HANGING)
    assert installed.ended(job_id)["state"] == "succeeded"
    assert [stage.kind for stage in installed.stages(job_id) if stage.crash_count] == ["score"]
    assert "no progress for" in installed.logs()
    return 1


def abort_a_stage(site: Site, _dice: random.Random) -> int:
    """A stage aborts its process at each attempt: it fails after MAX_CRASHES, and another job goes on."""
    installed = site.installed
    failing = installed.post("/rounds", ABORTING)
    other = installed.post("/samplings", SAMPLING)
    job = installed.ended(failing)
    assert (job["state"], job["error"]["code"]) == ("failed", "worker_lost")
    assert [stage.crash_count for stage in installed.stages(failing) if stage.crash_count] == [MAX_CRASHES]
    assert installed.ended(other)["state"] == "succeeded"
    return MAX_CRASHES


def restart_all(site: Site, dice: random.Random) -> int:
    """Stop each program with SIGTERM and restart it, one after the other. No attempt counts as failed or lost."""
    installed = site.installed
    names = [*WORKERS, "api", "sweeper"] if installed.mode == DEPLOYED else ["api"]
    job_id = site.start()
    for name in names:
        if name != "sweeper":
            until(lambda: installed.get(f"/jobs/{job_id}")["state"] != "queued")
        time.sleep(dice.uniform(0, 0.5))
        process = installed.process[name]
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0, name
        if name == "api":
            installed.start_api()
        elif name == "sweeper":
            installed.run("sweeper", "-m", "worker.sweeper")
        else:
            installed.start_worker(name)
    installed.ended(job_id)
    assert {(stage.attempt, stage.crash_count, stage.failure_count) for stage in installed.stages(job_id)} == {
        (1, 0, 0)
    }
    return len(names)


def work_with_wrong_clocks(site: Site, _dice: random.Random) -> int:
    """The clock of one worker is an hour fast, that of the other an hour slow. Only the database's clock counts."""
    job_id = site.start()
    other = site.installed.post("/samplings", SAMPLING | {"prompts": PROMPTS, "samples_per_prompt": 4})
    for done in (job_id, other):
        assert site.installed.ended(done)["state"] == "succeeded"
        assert not any(stage.crash_count for stage in site.installed.stages(done))
    return len(WORKERS)
