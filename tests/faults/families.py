"""The table of families of faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.deployment import DEPLOYED, EMBEDDED
from tests.faults import clients, outages, workers
from tests.faults.site import Setup, Site


@dataclass(frozen=True)
class Family:
    """A kind of fault.

    Attributes:
        name: Its name on the command line.
        title: What goes wrong, for the table of docs/reliability.md.
        run: Makes the faults of one round, from these random numbers. Returns their number.
        rounds: The rounds of a full run, by mode.
        setup: The installation.
    """

    name: str
    title: str
    run: Callable[[Site, random.Random], int]
    rounds: Mapping[str, int]
    setup: Setup = field(default_factory=Setup)


def _rounds(deployed: int, embedded: int = 0) -> Mapping[str, int]:
    return {mode: count for mode, count in ((DEPLOYED, deployed), (EMBEDDED, embedded)) if count}


FAMILIES = (
    Family("killed-workers", "three workers are killed during a round", workers.kill_workers, _rounds(24, 6)),
    Family("killed-trainings", "two training processes are killed", workers.kill_trainings, _rounds(16, 4)),
    Family(
        "interrupted-trainings",
        "a training is killed five times; its adapter equals an undisturbed one bit for bit",
        workers.interrupt_a_training,
        _rounds(7, 3),
    ),
    Family("stopped-workers", "a worker is stopped for longer than its lease", workers.stop_a_worker, _rounds(15, 5)),
    Family("hung-workers", "a worker hangs in a step", workers.hang_in_a_step, _rounds(16, 4)),
    Family("restarts", "every program gets SIGTERM in turn", workers.restart_all, _rounds(15, 5)),
    Family("redis-flushed", "Redis loses its data", outages.flush_redis, _rounds(20)),
    Family("redis-killed", "Redis crashes and is away for up to 2 s", outages.kill_redis, _rounds(20)),
    Family("redis-cut", "Redis cuts all connections", outages.cut_redis, _rounds(20)),
    Family("postgres-stopped", "PostgreSQL stops and is away for up to 10 s", outages.stop_postgres, _rounds(30)),
    Family("lost-commits", "three replies to commits are lost", outages.lose_commits, _rounds(50)),
    Family("lost-uploads", "three replies to uploads are lost", outages.lose_uploads, _rounds(50)),
    Family("storage", "S3 answers 503, cuts bodies, is slow", outages.disturb_storage, _rounds(30)),
    Family("killed-services", "the API is killed while it takes a request", clients.kill_the_service, _rounds(190, 10)),
    Family("cancels", "a job is cancelled at a random time", clients.cancel_a_job, _rounds(120, 80)),
    Family("migrations", "eight processes migrate at once", clients.migrate_at_once, _rounds(14, 6)),
    Family("full-disk", "the disk is full for up to 4 s", outages.fill_the_disk, _rounds(5, 5), Setup(small_disk=True)),
    Family(
        "aborting-stages",
        "a stage aborts its process each time",
        workers.abort_a_stage,
        _rounds(8, 2),
        Setup(settings=(("max_crashes", workers.MAX_CRASHES),)),
    ),
    Family(
        "wrong-clocks",
        "the workers' clocks are an hour fast and slow",
        workers.work_with_wrong_clocks,
        _rounds(10),
        # in files: an S3 server refuses requests whose signature is an hour off
        Setup(settings=(("s3_endpoint", ""),), wrong_clocks=True),
    ),
)


def family(name: str) -> Family:
    """The family of this name. Raises KeyError."""
    return {each.name: each for each in FAMILIES}[name]
