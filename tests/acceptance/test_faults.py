"""A selection of the fault suite, one round of each kind; `make test-faults` runs all (docs/reliability.md).

Each test prints its seed; DFUSION_FAULT_SEED repeats a run.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.deployment import DEPLOYED, EMBEDDED
from tests.faults.families import FAMILIES, family
from tests.faults.site import Setup, Site, site
from tests.faults.workers import kill_workers

SELECTION = {
    EMBEDDED: ("restarts", "stopped-workers", "hung-workers", "cancels"),
    DEPLOYED: (
        "killed-workers",
        "stopped-workers",
        "restarts",
        "redis-killed",
        "postgres-stopped",
        "lost-commits",
        "lost-uploads",
        "storage",
        "killed-services",
        "cancels",
    ),
}
"""Each has the setup that most families have, so that all share an installation in each mode."""
ONE_KILL = partial(kill_workers, kills=1)
ROUNDS = [
    pytest.param(mode, name, marks=pytest.mark.xdist_group(f"faults {mode}"))
    for mode, names in SELECTION.items()
    for name in names
]


@pytest.fixture(scope="module")
def site_of(pipeline: Path) -> Iterator[Callable[[str], Site]]:
    """Returns the installation of a mode, which is started at its first use."""
    opened: dict[str, Site] = {}
    with ExitStack() as stack:

        def get(mode: str) -> Site:
            if mode not in opened:
                opened[mode] = stack.enter_context(site(mode, Setup(), pipeline, {}))
            return opened[mode]

        yield get


@pytest.mark.parametrize(("mode", "name"), ROUNDS)
def test_nothing_is_lost_or_doubled(mode: str, name: str, site_of: Callable[[str], Site]) -> None:
    seed = int(os.environ.get("DFUSION_FAULT_SEED") or time.time_ns() % 1_000_000)
    sys.stdout.write(f"DFUSION_FAULT_SEED={seed}\n")
    here = site_of(mode)
    run = ONE_KILL if name == "killed-workers" else family(name).run
    assert run(here, random.Random(seed)) > 0
    here.check()


def test_all_families_have_other_names_and_rounds() -> None:
    assert len({each.name for each in FAMILIES}) == len(FAMILIES)
    assert all(each.rounds for each in FAMILIES)
