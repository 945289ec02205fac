"""What a stage works with: its claim, the workbench, files to store, and rows to write at its end.

A stage reads, works without a transaction, stores files, and returns a function that writes its rows. That function
runs in the transaction that ends the stage, so nothing half-made is ever seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from PIL import Image
from sqlalchemy.orm import Session

from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, load_optimizer
from dfusion.prompts import Prompt
from dfusion.trajectories import load_trajectory, save_trajectory
from dfusion.types import Trajectory
from service.db.clock import now_seconds
from service.db.queries import jobs, prompt_sets, results
from service.db.tables import Artifact, Model
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import JobSpec
from worker.heartbeat import Heartbeat
from worker.workbench import Workbench

T = TypeVar("T")
S = TypeVar("S")
S2 = TypeVar("S2")
Record = Callable[[Session], None]

PNG = "image/png"
SAFETENSORS = "application/vnd.safetensors"


def batches(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`things` in order, `size` at a time."""
    for start in range(0, len(things), size):
        yield things[start : start + size]


@dataclass
class StageContext:
    """One attempt at a stage."""

    bench: Workbench
    claim: Claim
    heartbeat: Heartbeat
    scratch: Path
    artifacts: list[Artifact] = field(default_factory=list)
    """Stored by this attempt; their rows are written by `record_artifacts`."""

    @property
    def spec(self) -> JobSpec:
        return self.claim.spec

    @overload
    def spec_as(self, first: type[S]) -> S: ...

    @overload
    def spec_as(self, first: type[S], second: type[S2]) -> S | S2: ...

    def spec_as(self, first: type[Any], second: type[Any] | None = None) -> Any:
        """The job's spec, which must be of one of these kinds. Raises ConflictError."""
        spec = self.claim.spec
        if isinstance(spec, (first, second or first)):
            return spec
        raise ConflictError(f"a {self.claim.kind} stage does not belong to a {type(spec).__name__}")

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A view of the database."""
        with self.bench.uow.reading() as session:
            yield session

    def prompts(self, set_id: str | None = None) -> tuple[Prompt, ...]:
        """The prompts of a set; the job's own if none is named."""
        with self.reading() as session:
            row = prompt_sets.by_id(session, set_id or jobs.get(session, self.claim.job_id).prompt_set_id or "")
            return () if row is None else prompt_sets.prompts_of(row)

    def span(self, of: str) -> tuple[int, int]:
        """The shard: `of` ("prompts" or "pairs") from the first up to, not including, the second."""
        start, stop = self.claim.params[of]
        return int(start), int(stop)

    def model(self, model_id: str) -> tuple[Model, Artifact | None]:
        """A model and its adapter."""
        with self.reading() as session:
            row = results.get_model(session, model_id)
            return row, self._adapter_of(session, row)

    def model_before(self, round_number: int) -> tuple[Model, Artifact | None]:
        """The model that a round of the job samples from, and its adapter."""
        with self.reading() as session:
            row = results.model_before(session, jobs.get(session, self.claim.job_id), round_number)
            return row, self._adapter_of(session, row)

    def _adapter_of(self, session: Session, row: Model) -> Artifact | None:
        adapter = row.adapter_artifact_id
        return None if adapter is None else results.get_artifact(session, adapter)

    def optimizer_of(self, row: Model) -> OptimizerState | None:
        """AdamW's moments after the model's training; None for a base model and an imported adapter. Raises
        StorageError, CheckpointError."""
        if row.optimizer_artifact_id is None:
            return None
        with self.reading() as session:
            artifact = results.get_artifact(session, row.optimizer_artifact_id)
        with self.bench.store.borrow(artifact.key, artifact.sha256) as path:
            return load_optimizer(path)

    def load_model(self, row: Model, adapter: Artifact | None) -> DiffusionModel:
        """That model, ready to sample."""
        return self.bench.models.with_adapter(row.base, adapter)

    def on_step(self, _step_index: int, _num_steps: int) -> None:
        """Counts a denoising step, and stops the stage where it must stop."""
        self.heartbeat.step()

    def store(self, slot: str, path: Path, media_type: str) -> str:
        """Store a file; the id of its artifact."""
        claim = self.claim
        stored = self.bench.store.put(claim.job_id, claim.stage_id, slot, path)
        path.unlink()
        row = Artifact(
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
        self.artifacts.append(row)
        return row.id

    def store_image(self, slot: str, pixels: np.ndarray) -> str:
        """Store an image, (H, W, 3) or (H, W) uint8; the id of its artifact."""
        path = self.scratch / "image.png"
        Image.fromarray(pixels).save(path)
        return self.store(slot, path, PNG)

    def store_trajectory(self, slot: str, trajectory: Trajectory) -> str:
        """Store trajectories; the id of their artifact."""
        path = self.scratch / "trajectory.safetensors"
        save_trajectory(path, trajectory)
        return self.store(slot, path, SAFETENSORS)

    def load_trajectories(self, ids: set[str]) -> Mapping[str, Trajectory]:
        """Stored trajectories by artifact."""
        with self.reading() as session:
            rows = results.artifacts(session, ids)
        loaded = {}
        for artifact_id, row in rows.items():
            self.heartbeat.check()
            with self.bench.store.borrow(row.key, row.sha256) as path:
                loaded[artifact_id] = load_trajectory(path)
        return loaded

    def load_image(self, row: Artifact) -> np.ndarray:
        """A stored image, (H, W, 3) uint8."""
        with self.bench.store.borrow(row.key, row.sha256) as path, Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    def read_bytes(self, row: Artifact) -> bytes:
        """A stored file's bytes."""
        with self.bench.store.borrow(row.key, row.sha256) as path:
            return path.read_bytes()

    def record_artifacts(self, session: Session) -> None:
        """Write the rows of what was stored."""
        results.add_all(session, self.artifacts)
