"""Faults of Redis, PostgreSQL, S3 and the disk."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from redis import Redis

from tests.faults.clients import submitting
from tests.faults.site import KINDS, SAMPLING, Site

COMMIT = b"COMMIT\0"
BUSY = ("sample", "score", "select", "fuse", "verify", "train")
TRANSITIONS = (b"stage.started", b"stage.succeeded", b"/checkpoint/")
"""Values that only the transactions of a claim, of an end and of a checkpoint contain."""
LOST_REPLIES = 3
_OUTAGE_SECONDS = 10.0


def flush_redis(site: Site, dice: random.Random) -> int:
    """Redis loses all hints."""
    return _disturb(site, dice, site.servers.redis.flush)


def kill_redis(site: Site, dice: random.Random) -> int:
    """Redis crashes and is away for up to two seconds."""

    def kill() -> None:
        site.servers.redis.kill()
        time.sleep(dice.uniform(0, 2))
        site.servers.redis.start()

    return _disturb(site, dice, kill)


def cut_redis(site: Site, dice: random.Random) -> int:
    """Redis closes all connections of its clients."""

    def cut() -> None:
        with Redis.from_url(site.servers.redis.url) as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)

    return _disturb(site, dice, cut)


def _disturb(site: Site, dice: random.Random, fault: Callable[[], None]) -> int:
    """Make the fault at a random time of a round."""
    site.catch(*BUSY)
    time.sleep(dice.uniform(0, 1))
    fault()
    return 1


def stop_postgres(site: Site, dice: random.Random) -> int:
    """PostgreSQL crashes, or is stopped gracefully, and is away for up to ten seconds. A client submits meanwhile."""
    postgres = site.servers.postgres
    site.catch(*KINDS)
    time.sleep(dice.uniform(0, 0.5))
    with submitting(site.installed, "/samplings", SAMPLING | {"seed": dice.randrange(1000)}, str(dice.random())):
        postgres.stop(dice.choice((signal.SIGQUIT, signal.SIGINT)))
        time.sleep(dice.choice((0.0, dice.uniform(0, 2), dice.uniform(2, _OUTAGE_SECONDS))))
        postgres.start()
    return 1


def lose_commits(site: Site, dice: random.Random) -> int:
    """Connections are cut at the COMMIT of a transition of a stage, which did or did not reach the server."""
    proxy = site.commits
    assert proxy is not None
    before = proxy.cuts
    for number in range(LOST_REPLIES):
        delivered = dice.random() < 0.7
        proxy.cut_at(COMMIT, delivered, answered=dice.random() < 0.7, after=dice.choice(TRANSITIONS))
        while proxy.cuts == before + number:
            site.catch(*BUSY)
    return proxy.cuts - before


def lose_uploads(site: Site, dice: random.Random) -> int:
    """The replies to uploads are lost, after the server has stored them."""
    storage = site.storage
    assert storage is not None
    before = storage.count
    for number in range(LOST_REPLIES):
        site.catch(*KINDS)
        time.sleep(dice.uniform(0, 0.2))
        storage.lose_replies(1, dice)
        while storage.count == before + number:
            site.catch(*BUSY)
    return storage.count - before


def disturb_storage(site: Site, dice: random.Random) -> int:
    """The S3 server answers 503, cuts bodies and is slow, for up to four seconds."""
    storage = site.storage
    assert storage is not None
    before = storage.count
    site.start()
    storage.begin(dice, refuse=dice.uniform(0.1, 0.6), cut=dice.uniform(0, 0.4), slow=dice.uniform(0, 0.2))
    time.sleep(dice.uniform(1, 4))
    while storage.count == before:
        site.catch(*KINDS)
    storage.end()
    return storage.count - before


def fill_the_disk(site: Site, dice: random.Random) -> int:
    """The disk of the data folder is full for a while."""
    ballast = site.installed.settings.data_dir / "ballast"
    site.catch(*KINDS)
    time.sleep(dice.uniform(0, 0.5))
    try:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 14))
            except OSError:
                pass  # the disk is full
        time.sleep(dice.uniform(1, 4))
    finally:
        ballast.unlink()
    return 1
