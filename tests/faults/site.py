"""The installation that the faults hit, and the jobs that run on it meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from service.db.tables import Stage
from tests import invariants
from tests.deployment import DEPLOYED, FINAL, PATIENCE_SECONDS, WORKERS, Deployment, Servers, deployment, with_password
from tests.faults.storage_line import StorageFaults
from tests.forking import call
from tests.proxy import proxy_of_lines
from tests.servers import CuttingProxy, cutting_proxy
from tests.service import PROMPTS, round_body

SETTINGS: dict[str, Any] = {
    "lease_seconds": 3,
    "heartbeat_seconds": 0.2,
    "sweep_seconds": 0.3,
    "checkpoint_seconds": 0.05,
    "max_crashes": 1000,
    "max_attempts": 1000,
    "retry_seconds": 0.05,
    "restart_seconds": 0.001,
    "shard_prompts": 1,
}
"""Other than the defaults, so that a recovery takes seconds and a job outlives any number of faults."""
ROUND = round_body(
    prompts=PROMPTS[:2],
    sampling={"num_steps": 4},
    fusion={"first_step": 1, "last_step": 3},
    training={"examples_per_update": 1, "micro_batch": 4, "inner_epochs": 1},
    evaluation=None,
)
PAIRS = 4
"""Two prompts; of four samples a quarter are references, used twice."""
LONG_TRAINING = ROUND | {"training": {"examples_per_update": 1, "micro_batch": 4, "inner_epochs": 8}}
SAMPLING = {"model": "tiny", "prompts": PROMPTS[:1], "samples_per_prompt": 1, "sampling": {"num_steps": 2}}
KINDS = ("sample", "fuse", "train")
"""The kinds of stages that take longest."""
_DISK = "48m"
_CLOCK_SECONDS = {WORKERS[0]: 3600, WORKERS[1]: -3600}
_POLL_SECONDS = 0.05


class UnavailableError(Exception):
    """This machine cannot make the fault."""


@dataclass(frozen=True)
class Setup:
    """What a family needs of its installation.

    Attributes:
        settings: Settings other than SETTINGS.
        small_disk: The data folder is a small file system, which can be filled.
        wrong_clocks: The clock of one worker is an hour fast, that of the other an hour slow.
    """

    settings: tuple[tuple[str, Any], ...] = ()
    small_disk: bool = False
    wrong_clocks: bool = False


@dataclass
class Site:
    """An installation, the ways to its servers, and the jobs of the current round of faults."""

    installed: Deployment
    commits: CuttingProxy | None = None
    """Lies between the installation and its PostgreSQL."""
    storage: StorageFaults | None = None
    """Lies between the installation and its S3 server."""
    adapters: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of the adapter of each undisturbed job, by its request. Shared by sites."""
    _disturbed: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set)

    @property
    def servers(self) -> Servers:
        """The servers of deployed mode."""
        assert self.installed.servers is not None
        return self.installed.servers

    def start(self, body: dict[str, Any] = ROUND) -> str:
        """Submit a round job that must end as if there were no faults. Returns its id."""
        self.require_adapter(body)
        job_id = self.installed.post("/rounds", body)
        self._disturbed.append((job_id, body))
        return job_id

    def require_adapter(self, body: dict[str, Any]) -> str:
        """Return the SHA-256 of the adapter of the undisturbed job, which is run if it has not been yet."""
        key = json.dumps(body, sort_keys=True)
        if key not in self.adapters:
            job = self.installed.done("/rounds", body)
            self.adapters[key] = invariants.adapter_sha256(self.installed.service, job["id"])
        return self.adapters[key]

    def catch(self, *kinds: str, body: dict[str, Any] = ROUND) -> Stage:
        """Wait for an attempt at a stage of these kinds that was not caught yet. Starts a job if none runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            job_id = self._disturbed[-1][0] if self._disturbed else None
            if job_id is None or self.installed.get(f"/jobs/{job_id}")["state"] in FINAL:
                job_id = self.start(body)
            stage = self.installed.running(job_id, *kinds)
            if stage is not None and (stage.id, stage.lease_epoch) not in self._seen:
                self._seen.add((stage.id, stage.lease_epoch))
                return stage
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"no stage of the kinds {kinds} started\n{self.installed.logs()[-20_000:]}")

    def check(self) -> None:
        """Wait for all jobs to end and check the invariants. Then the next round of faults can begin."""
        installed = self.installed
        for job_id in installed.accepted:
            installed.ended(job_id)
        for job_id, body in self._disturbed:
            job = installed.get(f"/jobs/{job_id}")
            assert (job["state"], job["error"]) == ("succeeded", None), installed.logs()[-20_000:]
            invariants.expect_pairs(installed.service, job_id, PAIRS)
            assert invariants.adapter_sha256(installed.service, job_id) == self.require_adapter(body)
        invariants.check(installed.service, installed.accepted, installed.logs(), installed.secrets)
        self._disturbed.clear()
        self._seen.clear()


@contextmanager
def site(mode: str, setup: Setup, pipeline: Path, adapters: dict[str, str]) -> Iterator[Site]:
    """Run an installation during the block. Raises UnavailableError if this machine cannot provide its setup."""
    settings = SETTINGS | dict(setup.settings)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)  # for PostgreSQL's user
        if setup.small_disk:
            settings |= {"min_free_disk_mb": 0}
            stack.enter_context(_small_disk(folder / "data"))

        storage = StorageFaults()
        commits: list[CuttingProxy] = []

        def reroute(servers: Servers) -> dict[str, Any]:
            commits.append(stack.enter_context(cutting_proxy(servers.postgres.port)))
            port = stack.enter_context(proxy_of_lines(servers.s3.port, storage.new_line))
            database = make_url(servers.postgres.create_database()).set(port=commits[0].port)
            return {
                "database_url": with_password(database.render_as_string(hide_password=False)),
                "s3_endpoint": f"127.0.0.1:{port}",
            }

        workers = _wrong_clocks(folder) if setup.wrong_clocks else {}
        installed = stack.enter_context(
            deployment(mode, folder, pipeline, reroute=reroute, workers=workers, **settings)
        )
        is_deployed = mode == DEPLOYED
        yield Site(installed, commits[0] if is_deployed else None, storage if is_deployed else None, adapters)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system at `folder` during the block."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError("a small file system (tmpfs) cannot be mounted") from error
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _wrong_clocks(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """Build the library that shifts a process's clock. Returns the environment of the workers."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise UnavailableError("there is no C compiler for the library that shifts a clock")
    library = folder / "shifted_clock.so"
    source = Path(__file__).with_name("shifted_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environments = {
        name: {"LD_PRELOAD": str(library), "SHIFT_SECONDS": str(seconds)} for name, seconds in _CLOCK_SECONDS.items()
    }
    for name, seconds in _CLOCK_SECONDS.items():
        shown = subprocess.run(
            [sys.executable, "-c", "import datetime; print(datetime.datetime.now().timestamp())"],
            env=environments[name],
            capture_output=True,
            check=True,
        )
        if abs(float(shown.stdout) - time.time() - seconds) > 60:
            raise UnavailableError("the clock of a process cannot be shifted")
    return environments


def save_pipeline(folder: Path) -> None:
    """Save the small random pipeline. In a fork, which has torch."""
    from tests.nets import tiny_pipeline

    tiny_pipeline().save_pretrained(folder)


@contextmanager
def saved_pipeline() -> Iterator[Path]:
    """A folder with the small random pipeline."""
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        call(save_pipeline, Path(folder))
        yield Path(folder)
