"""Additional processes of a training, one for each device of `DFUSION_TRAINING_DEVICES`. The worker is rank 0."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from dfusion.adapter import save_adapter
from dfusion.distributed import Ranks, process_group
from dfusion.errors import RankLostError
from dfusion.models import DiffusionModel
from dfusion.shared_examples import share_examples
from dfusion.training import Trainer
from service.errors import RankFailedError
from worker.context import StageContext

JOB_FILE = "job.json"
ADAPTER_FILE = "adapter.safetensors"
EXAMPLES_FILE = "examples.safetensors"
GROUP_FILE = "group"
_POLL_SECONDS = 0.1
_END_SECONDS = 30
_logger = logging.getLogger(__name__)


def ready_file(folder: Path, rank: int) -> Path:
    """The file by which a rank says that it has loaded its model."""
    return folder / f"ready-{rank}"


def error_file(folder: Path, rank: int) -> Path:
    """The file with the error of a rank that has failed: code, message, retryable and traceback."""
    return folder / f"error-{rank}.json"


class TrainingRanks:
    """The additional processes of one training. They end with the context of `running`, and with this process.

    Args:
        context: The stage.
        base: The name of the base model.
    """

    def __init__(self, context: StageContext, base: str) -> None:
        self._context = context
        self._base = base
        self._devices = context.bench.settings.training_devices
        self._folder = context.scratch / "ranks"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.own = Ranks(0, 1 + len(self._devices), self._waiting)

    @contextmanager
    def running(self, model: DiffusionModel, trainer: Trainer) -> Iterator[None]:
        """Run the additional processes, which take part in all remaining updates. Does nothing without devices.

        Raises:
            RankLostError: A process has ended or does not respond.
            RankFailedError: A process has failed with an error.
        """
        if not self._devices:
            yield
            return

        folder = self._folder
        folder.mkdir()
        self._write_job(folder, model, trainer)
        try:
            for rank in range(1, self.own.size):
                command = [sys.executable, "-m", "worker.rank", str(folder), str(rank)]
                self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            self._wait_until_ready(folder)
            timeout = self._context.bench.settings.stuck_seconds
            with process_group(folder / GROUP_FILE, 0, self.own.size, timeout):
                yield
        except RankLostError:
            self._require_no_error()
            raise
        finally:
            self._end_processes()

    def _end_processes(self) -> None:
        """Kill all processes. One that the system does not end in time does not hide the error of the training."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            if process.stdin is not None:
                process.stdin.close()

    def _waiting(self) -> AbstractContextManager[None]:
        """Other ranks may take longer than a step of this one, for example on a slower GPU."""
        return self._context.heartbeat.phase("waiting for the other ranks of the training")

    def require_alive(self) -> None:
        """Raise RankFailedError if a process has failed with an error, RankLostError if one has ended otherwise."""
        self._require_no_error()
        for rank, process in enumerate(self._processes, 1):
            code = process.poll()
            if code is not None:
                device = self._devices[rank - 1]
                raise RankLostError(f"rank {rank} of the training, on {device}, ended with exit code {code}")

    def _require_no_error(self) -> None:
        """Raise RankFailedError if a process has reported an error."""
        for rank, device in enumerate(self._devices, 1):
            file = error_file(self._folder, rank)
            if file.exists():
                error = json.loads(file.read_text("utf-8"))
                _logger.error("rank %d of the training, on %s, failed:\n%s", rank, device, error["traceback"])
                message = f"rank {rank} of the training, on {device}: {error['message']}"
                raise RankFailedError(message, error["code"], error["retryable"])

    def _write_job(self, folder: Path, model: DiffusionModel, trainer: Trainer) -> None:
        """Write everything that the processes need: they have no access to the database or the storage."""
        settings = self._context.bench.settings
        job = {
            "source": self._context.bench.models.source(self._base),
            "dtype": self._context.bench.catalogue.models[self._base].dtype,
            "compiled": settings.compile_models,
            "config": trainer.config.model_dump(mode="json"),
            "seed": trainer.seed,
            "devices": self._devices,
            "threads": settings.torch_threads,
            "timeout_seconds": settings.stuck_seconds,
        }
        (folder / JOB_FILE).write_text(json.dumps(job), "utf-8")
        save_adapter(model.unet, folder / ADAPTER_FILE)
        share_examples(trainer.examples, folder / EXAMPLES_FILE)
        trainer.state().save(folder)

    def _wait_until_ready(self, folder: Path) -> None:
        with self._context.heartbeat.phase("starting the ranks of the training"):
            for rank in range(1, self.own.size):
                while not ready_file(folder, rank).exists():
                    self.require_alive()
                    self._context.heartbeat.check()
                    time.sleep(_POLL_SECONDS)
