"""The context of a stage: its claim, the workbench, and the files that it loads and stores. No database."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, load_optimizer
from dfusion.rewards import Scorer
from dfusion.spool import SpooledTrajectory, TrajectorySpool
from dfusion.trajectories import load_trajectory, save_trajectory
from dfusion.types import Trajectory
from service.db.clock import now_seconds
from service.db.tables import Artifact
from service.ids import IdKind, new_id
from service.jobs import execution
from service.jobs.execution import Claim
from service.jobs.kinds import ScorerRef
from service.storage import StoredObject
from worker.heartbeat import Heartbeat
from worker.inputs import StoredModel, StoredSample, trajectory_file
from worker.workbench import Workbench

T = TypeVar("T")
R = TypeVar("R")

PNG = "image/png"
SAFETENSORS = "application/vnd.safetensors"

_FILE_THREADS = 4
"""Threads that read or store images. Much of their time is waiting for the disk or the network."""


def batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`values` in order, `size` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _result_if_it_fits(work: Callable[[Sequence[T]], R], batch: Sequence[T]) -> R | None:
    """None if a batch of several values runs out of memory. The exception is dropped, because it references tensors."""
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        return None


@contextmanager
def _threads(name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads for files. At the end of the block, files that are not begun are cancelled; the others are waited for."""
    pool = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class StageContext:
    """One attempt at a stage.

    Attributes:
        bench: The installation with its models and scorers.
        claim: The stage under this worker's lease.
        heartbeat: Counts steps, and raises when the stage must stop.
        scratch: A folder that is removed after the attempt.
        artifacts: The files that this attempt stored. Their rows are written when the stage ends.
    """

    bench: Workbench
    claim: Claim
    heartbeat: Heartbeat
    scratch: Path
    artifacts: list[Artifact] = field(default_factory=list)

    def on_step(self, _step_index: int, _num_steps: int) -> None:
        """Count a denoising step. Raises as `Heartbeat.step` does."""
        self.heartbeat.step()

    # events and checkpoints: under the lease's epoch, in separate transactions

    def note(self, kind: str, message: str, **data: object) -> None:
        """Write an event of the job at once, before the stage ends. Raises LeaseLostError."""
        with self.heartbeat.phase(f"writing the event {kind}"):
            execution.note(self.bench.uow, self.bench.settings, self.claim, kind, message, **data)

    def keep_checkpoint(self, stored: StoredObject) -> None:
        """Record the file from which the next attempt of the stage resumes. Raises LeaseLostError."""
        with self.heartbeat.phase("recording a checkpoint"):
            execution.checkpoint(self.bench.uow, self.bench.settings, self.claim, stored)

    # batches

    def in_batches(self, values: Sequence[T], work: Callable[[Sequence[T]], R], steps: int = 0) -> Iterator[R]:
        """The results of `work` for the values in order, DFUSION_BATCH_SIZE at a time.

        A batch that does not fit into the GPU's memory is retried in halves, and this worker's later batches in stages
        of the kind and job have the smaller size. An event says so.

        Args:
            values: The values.
            work: Computes the result of a batch, which is not None. It may be called again with a part of the batch.
            steps: The number of steps that `work` counts for a batch, to be planned; 0 if they are planned elsewhere.

        Raises:
            torch.OutOfMemoryError: A single value does not fit.
            LeaseLostError: Another worker has the stage.
        """
        start = 0
        while start < len(values):
            size = self.bench.batch_size(self.claim)
            batch = values[start : start + size]
            if steps:
                self.heartbeat.plan(self.heartbeat.done + steps * math.ceil((len(values) - start) / size))
            result = _result_if_it_fits(work, batch)
            if result is not None:
                yield result
                start += len(batch)
                continue

            torch.cuda.empty_cache()
            smaller = len(batch) // 2
            self.bench.shrink_batches(self.claim, smaller)
            message = f"out of GPU memory with a batch of {len(batch)}: continuing with batches of {smaller}"
            self.note("stage.smaller_batches", message)

    # stored files

    def load_model(self, model: StoredModel) -> DiffusionModel:
        """The model, ready to sample."""
        with self.heartbeat.phase(f"loading the model {model.row.base}"):
            return self.bench.models.with_adapter(model.row.base, model.adapter)

    def load_scorer(self, scorer: ScorerRef) -> Scorer:
        """A scorer, loaded once for all stages of this process. Raises ModelNotFoundError."""
        with self.heartbeat.phase("loading a scorer"):
            return self.bench.scorer(scorer)

    def load_optimizer(self, artifact: Artifact) -> OptimizerState:
        """A stored state of AdamW. Raises StorageError, CheckpointError."""
        with self._borrow(artifact) as path:
            return load_optimizer(path)

    def load_trajectories(self, samples: Iterable[StoredSample]) -> dict[str, Trajectory]:
        """The stored trajectories of these samples, by artifact id. Samples without one are skipped."""
        artifacts = {sample.trajectory.id: sample.trajectory for sample in samples if sample.trajectory is not None}
        trajectories = {}
        for artifact in artifacts.values():
            self.heartbeat.check()
            with self._borrow(artifact) as path:
                trajectories[artifact.id] = load_trajectory(path)
        return trajectories

    def spool_trajectories(self, samples: Iterable[StoredSample]) -> dict[str, SpooledTrajectory]:
        """The stored trajectories of these samples, by sample id, with their latents in files in `scratch`.

        Each stored file is read and verified once, one ahead of the others, so at most two of them are in memory.

        Raises:
            TrajectoryGoneError: A trajectory is no longer stored.
            StorageError: A file cannot be read.
        """
        # 1. the samples of each file
        by_file: dict[str, list[StoredSample]] = {}
        artifacts: dict[str, Artifact] = {}
        for sample in {sample.row.id: sample for sample in samples}.values():
            artifact = trajectory_file(sample)
            artifacts[artifact.id] = artifact
            by_file.setdefault(artifact.id, []).append(sample)

        # 2. their latents, file by file
        spool = TrajectorySpool(self.scratch)
        spooled = {}
        files = list(artifacts.values())
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = [reader.submit(self._read_trajectory, artifact) for artifact in files[:1]]
            for position, artifact in enumerate(files):
                self.heartbeat.check()
                with self.heartbeat.phase(f"reading {artifact.slot}"):
                    trajectory = ahead.pop().result()
                ahead += [
                    reader.submit(self._read_trajectory, following) for following in files[position + 1 : position + 2]
                ]
                for sample in by_file[artifact.id]:
                    spooled[sample.row.id] = spool.add(trajectory, sample.row.trajectory_row or 0)
        return spooled

    def _read_trajectory(self, artifact: Artifact) -> Trajectory:
        with self.bench.store.borrow(artifact.key, artifact.sha256) as path:
            return load_trajectory(path)

    def load_images(self, artifacts: Sequence[Artifact]) -> list[np.ndarray]:
        """Stored images, (H, W, 3) uint8, read by several threads.

        Raises:
            StorageError: An image cannot be read.
            StageError: The stage must stop.
        """
        images = []
        with _threads("read-images") as readers:
            reads = [readers.submit(self._read_image, artifact) for artifact in artifacts]
            for artifact, read in zip(artifacts, reads, strict=True):
                self.heartbeat.check()
                with self.heartbeat.phase(f"reading {artifact.slot}"):
                    images.append(read.result())
        return images

    def load_image(self, artifact: Artifact) -> np.ndarray:
        """A stored image, (H, W, 3) uint8."""
        with self.heartbeat.phase(f"reading {artifact.slot}"):
            return self._read_image(artifact)

    def _read_image(self, artifact: Artifact) -> np.ndarray:
        with self.bench.store.borrow(artifact.key, artifact.sha256) as path, Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    def read_bytes(self, artifact: Artifact) -> bytes:
        """The bytes of a stored file."""
        with self._borrow(artifact) as path:
            return path.read_bytes()

    @contextmanager
    def _borrow(self, artifact: Artifact) -> Iterator[Path]:
        with ExitStack() as stack:
            with self.heartbeat.phase(f"reading {artifact.slot}"):
                path = stack.enter_context(self.bench.store.borrow(artifact.key, artifact.sha256))
            yield path

    # files that this attempt stores

    def put(self, slot: str, path: Path) -> StoredObject:
        """Store a copy of a file, without an artifact. Raises StorageError."""
        with self.heartbeat.phase(f"storing {slot}"):
            return self._put(slot, path)

    def _put(self, slot: str, path: Path) -> StoredObject:
        return self.bench.store.put(self.claim.job_id, self.claim.stage_id, slot, path)

    def store(self, slot: str, path: Path, media_type: str) -> str:
        """Move a file into the storage.

        Args:
            slot: The name of the file within the stage; part of its key.
            path: The file, in `scratch`.
            media_type: Its MIME type.

        Returns:
            The id of its artifact.
        """
        stored = self.put(slot, path)
        path.unlink()
        return self._add_artifact(slot, stored, media_type)

    def _add_artifact(self, slot: str, stored: StoredObject, media_type: str) -> str:
        claim = self.claim
        artifact = Artifact(
            id=new_id(IdKind.ARTIFACT),
            job_id=claim.job_id,
            stage_id=claim.stage_id,
            slot=slot,
            key=stored.key,
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            media_type=media_type,
            created_at=now_seconds(),
        )
        self.artifacts.append(artifact)
        return artifact.id

    @contextmanager
    def storing_images(self) -> Iterator[ImageWriter]:
        """Store images by several threads within the block, at the same time as other work. See `ImageWriter`."""
        with _threads("store-images") as pool:
            yield ImageWriter(self, pool)

    def store_image(self, slot: str, pixels: np.ndarray) -> str:
        """Store an image, (H, W, 3) or (H, W) uint8. Returns the id of its artifact."""
        with self.storing_images() as images:
            images.add(slot, pixels)
            [artifact_id] = images.ids()
        return artifact_id

    def _put_image(self, slot: str, pixels: np.ndarray) -> StoredObject:
        path = self.scratch / f"{slot}.png"
        Image.fromarray(pixels).save(path)
        stored = self._put(slot, path)
        path.unlink()
        return stored

    def store_trajectory(self, slot: str, trajectory: Trajectory) -> str:
        """Store trajectories. Returns the id of their artifact."""
        path = self.scratch / "trajectory.safetensors"
        save_trajectory(path, trajectory)
        return self.store(slot, path, SAFETENSORS)


class ImageWriter:
    """Images that several threads encode and store, from `StageContext.storing_images`."""

    def __init__(self, context: StageContext, pool: ThreadPoolExecutor) -> None:
        self._context = context
        self._pool = pool
        self._pending: list[tuple[str, Future[StoredObject]]] = []
        self._checked = 0
        """The number of images, from the first one, that are known to be stored."""

    def add(self, slot: str, pixels: np.ndarray) -> None:
        """Store an image, (H, W, 3) or (H, W) uint8, without waiting for it.

        Raises:
            StorageError: An earlier image cannot be stored.
        """
        while self._checked < len(self._pending) and self._pending[self._checked][1].done():
            self._pending[self._checked][1].result()
            self._checked += 1
        self._pending.append((slot, self._pool.submit(self._context._put_image, slot, pixels)))

    def add_batch(self, images: np.ndarray) -> None:
        """Store images (B, H, W, 3) uint8 in the slots image-000000, image-000001 and so on, over all batches."""
        for row, pixels in enumerate(images, len(self._pending)):
            self.add(f"image-{row:06d}", pixels)

    def ids(self) -> list[str]:
        """Wait until all images are stored, and return the ids of their artifacts in order. Call it once, at the end.

        Raises:
            StorageError: An image cannot be stored.
            StageError: The stage must stop.
        """
        ids = []
        for slot, result in self._pending:
            self._context.heartbeat.check()
            with self._context.heartbeat.phase(f"storing {slot}"):
                stored = result.result()
            ids.append(self._context._add_artifact(slot, stored, PNG))
        return ids
